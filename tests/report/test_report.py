import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from qpipe.errors import ConfigError, PluginError
from qpipe.host import load_plugins
from qpipe.plugin import Plugin, hookimpl
from qpipe.report import write_report
from qpipe.report.document import collect_sections
from qpipe.types import ReportSection

pytestmark = pytest.mark.usefixtures("only_report")

VOID = {"meta", "br", "img", "path", "use", "rect", "line", "polygon"}


class Page(HTMLParser):
    """Collects text, ids and references, and checks that tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.references, self.stack, self.text, self.tags = [], [], [], [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [v for k, v in attributes.items() if k in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(run_dir):
    html = write_report(run_dir).read_text()
    return html, Page(html)


def test_report_holds_the_numbers_of_the_run(reported):
    html = (reported / "report.html").read_text()
    for number in ("0.8713", "0.8531", "-0.0182", "12.3 MB", "90.9 MB", "7.4x smaller", "4.28", "3 min 02 s", "4.3 kB"):
        assert number in html, number
    tensors = json.loads((reported / "tensors.json").read_text())
    for tensor in tensors:
        assert tensor["name"] in html
        assert f">{tensor['sqnr_db']:.1f}<" in html
        assert f">{tensor['kurtosis']:.2f}<" in html
    text = " ".join(Page(html).text)
    for title in ("Result", "Training", "Quantized layers", "Size", "Quantization error", "Configuration"):
        assert text.count(title) >= 2, f"{title} has to be in the contents and as a heading"
    assert "demo/penalty" in text
    assert 'class="missing"' not in html


def test_report_is_one_file_without_references_to_others(reported):
    html = (reported / "report.html").read_text()
    page = Page(html)
    assert sorted(p.name for p in reported.iterdir()) == sorted(
        ["config.yaml", "export", "metrics.jsonl", "plan.json", "report.html", "results.json", "tensors.json"]
    )
    assert not re.search(r"https?://", html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("figure") == 4
    assert all(r.startswith("#") for r in page.references)
    assert {r[1:] for r in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_plots_use_the_colours_of_the_page(reported):
    html = (reported / "report.html").read_text()
    assert "#a1b2" not in html.lower()
    plots = re.findall(r'<svg role="img".*?</svg>', html, flags=re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        assert "<text" in plot and "var(--ink)" in plot and "var(--series-1)" in plot
        assert "#000000" not in plot


def test_text_from_outside_is_escaped(run_dir):
    plan = json.loads((run_dir / "plan.json").read_text())
    plan[0]["site"] = "<img src=x onerror=alert(1)>.0.dense:weight"
    (run_dir / "plan.json").write_text(json.dumps(plan))
    tensors = json.loads((run_dir / "tensors.json").read_text())
    tensors[0]["name"] = "<i>a</i> $x_{$"
    tensors[0]["sqnr_db"] = -5.0
    (run_dir / "tensors.json").write_text(json.dumps(tensors))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1, "step": 300, "kind": "train", "loss": 0.1, "<u>part</u> $y_{$": 1.0}) + "\n")
    html, page = report(run_dir)
    assert not {"img", "i", "b", "u"} & set(page.tags)
    assert "some/&lt;b&gt;encoder" in html and "&lt;img src=x" in html and "&lt;i&gt;a&lt;/i&gt;" in html


def test_missing_pieces_are_said_to_be_missing(run_dir):
    for name in ("plan.json", "tensors.json", "results.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    (run_dir / "export" / "model.safetensors").unlink()
    (run_dir / "export").rmdir()
    html, page = report(run_dir)
    text = " ".join(page.text)
    for name in ("plan.json", "tensors.json", "results.json", "metrics.jsonl", "export/"):
        assert f"{name} is missing" in text, name
    assert "figure" not in page.tags
    assert "0.8713" not in html


@pytest.mark.usefixtures("no_plots")
def test_parts_of_results_that_were_not_measured_are_named(run_dir):
    (run_dir / "results.json").write_text(json.dumps({"evaluation": {"accuracy": 0.5}, "seconds": {}}))
    (run_dir / "metrics.jsonl").write_text('{"time": 1, "step": 10, "kind": "train", "loss": 0.5, "lr": 0.1}\n')
    html, page = report(run_dir)
    assert "Not measured: full-precision teacher, packed checkpoint, reloaded." in " ".join(page.text)
    assert "No evaluation has been logged." in html
    assert "The size was not measured" in html


@pytest.mark.usefixtures("no_plots")
def test_a_damaged_file_is_named_and_other_sections_remain(run_dir):
    (run_dir / "tensors.json").write_text('[{"name": "a"}]')
    (run_dir / "plan.json").write_text("[")
    html, _ = report(run_dir)
    assert "tensors.json: 0.bits: Field required" in html
    assert "plan.json is not valid JSON" in html
    assert "0.8713" in html


@pytest.mark.usefixtures("no_plots")
def test_a_plugin_that_is_gone_is_named_and_does_not_fail_the_report(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["plugins"] = {"no-such-plugin": {"weight": 1}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    html, _ = report(run_dir)
    assert "no-such-plugin" in html and "installed" in html and 'class="problem"' in html
    assert "0.8713" in html


class Extra(Plugin):
    @hookimpl
    def qpipe_report_sections(self, run_dir):
        return [ReportSection("Second", "<p>2</p>", 25), ReportSection("Early", f"<p>{run_dir.name}</p>", 5)]


class Broken(Plugin):
    @hookimpl
    def qpipe_report_sections(self, run_dir):
        yield ReportSection("Never", "")
        raise ValueError("no <data>")


class Clash(Plugin):
    @hookimpl
    def qpipe_report_sections(self, run_dir):
        return [ReportSection("Result", "<p>mine</p>")]


@pytest.mark.usefixtures("no_plots")
def test_plugins_add_sections_in_order_and_a_broken_one_is_reported(run_dir, monkeypatch):
    host = load_plugins({}, extra=[("extra", Extra()), ("broken", Broken())])
    sections, problems = collect_sections(host, run_dir)
    assert [s.title for s in sections][:4] == ["Early", "Result", "Training", "Second"]
    assert problems == ["Plugin 'broken' could not make its sections: ValueError: no <data>"]
    monkeypatch.setattr("qpipe.report.document.load_host", lambda options: (host, []))
    html, _ = report(run_dir)
    assert f"<p>{run_dir.name}</p>" in html and "no &lt;data&gt;" in html


@pytest.mark.usefixtures("no_plots")
def test_two_sections_of_one_title_are_an_error_that_names_both(run_dir):
    host = load_plugins({}, extra=[("clash", Clash())])
    with pytest.raises(PluginError, match=r"'Result' is offered by both '.*' and '.*'"):
        collect_sections(host, run_dir)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml.*qpipe launch --out DIR"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report(tmp_path / "nothing")


@pytest.mark.usefixtures("no_plots")
def test_the_report_goes_where_it_is_asked_to(run_dir, tmp_path):
    out = tmp_path / "deep" / "r.html"
    assert write_report(run_dir, out) == out
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert not (run_dir / "report.html").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        write_report(run_dir, tmp_path)


def test_importing_the_report_loads_no_heavy_library():
    code = (
        "import sys, qpipe.report, qpipe.builtin.report, qpipe.builtin.log\n"
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
