import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from qpipe_kure import Kure, KureOptions, kurtosis
from safetensors.torch import load_file, save_file
from torch import nn

from qpipe import CheckpointError, ConfigError, ModelError, QuantContext, Site, SiteError, TrainingError, moments
from qpipe.stages import plan_run
from qpipe.testing import tiny_config, tiny_model


def model():
    torch.manual_seed(0)
    made = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "query": nn.Linear(16, 16), "ffn": nn.Linear(16, 64)})
    made["head"] = nn.Linear(16, 2)
    with torch.no_grad():
        made["ffn"].weight[0, 0] = 1e3
    return made


def make_run(tmp_path, planned=("embedding", "query", "ffn"), student=None):
    student = student or model()
    sites = {
        f"{path}:weight": Site(path, "weight", type(module).__name__, tuple(module.weight.shape))
        for path, module in student.named_modules()
        if path
    }
    plan = {name: SimpleNamespace(site=site) for name, site in sites.items() if site.path in planned}
    sites["query:input"] = Site("query", "input", "Linear")
    plan["query:input"] = SimpleNamespace(site=sites["query:input"])
    return SimpleNamespace(
        student=student,
        plan=SimpleNamespace(sites=plan),
        instruments=SimpleNamespace(sites=sites, context=QuantContext(), quantizers=dict),
        engine=SimpleNamespace(rank=0),
        out=tmp_path,
        total_steps=10,
        trained=False,
    )


def start(run, **options):
    # The planted outlier of `model` is there to be selected or left out by each test on its own terms.
    plugin = Kure(KureOptions(**{"skip_above": None, **options}))
    (term,) = plugin.qpipe_weight_losses(run)
    return plugin, term


def chosen(run, **options):
    plugin, term = start(run, **options)
    return [name for name in ("embedding", "query", "ffn", "head") if term.applies(name)], plugin


def test_quantized_weights_without_embeddings_by_default(tmp_path):
    assert chosen(make_run(tmp_path))[0] == ["query", "ffn"]


def test_weight_and_steps_between_reach_the_penalty(tmp_path):
    _, term = start(make_run(tmp_path), weight=0.25, every=3)
    assert (term.weight, term.every) == (0.25, 3)


def test_include_exclude_and_skip_above(tmp_path, caplog):
    run = make_run(tmp_path)
    assert chosen(run, include=["*d*"])[0] == ["embedding", "head"]
    assert chosen(run, exclude=["ff*"])[0] == ["query"]
    with caplog.at_level(logging.INFO, "qpipe.kure"):
        names, plugin = chosen(run, skip_above=100)
    assert names == ["query"] and "1 of 4 weights are regularized" in caplog.text
    reasons = {c.name: c.left_out for c in plugin.candidates}
    assert reasons == {"embedding": "embedding", "query": "", "ffn": "kurtosis above 100", "head": "not quantized"}
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in caplog.text.splitlines() if line}
    for name, reason in reasons.items():
        value = kurtosis(run.student[name].weight)
        assert lines[name] == [format(value, ".4g"), *([reason] if reason else [])], "printed with its reason"
    assert [c.kurtosis for c in plugin.candidates] == [kurtosis(run.student[name].weight) for name in reasons]


def test_ernies_second_ffn_matrices_are_left_out_by_their_kurtosis(tmp_path, caplog):
    """`skip_above: 100` gives what the paper's authors left out of ERNIE by name: every second matrix of an FFN."""
    folder = tiny_model(tmp_path / "ernie", "ernie", num_hidden_layers=3)
    state = load_file(folder / "model.safetensors")
    second = [name for name in state if name.endswith("output.dense.weight") and "attention" not in name]
    for name in second:
        state[name][3, 5] = 100 * state[name].std()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = tiny_config(tmp_path, {"kure": {"skip_above": 100}}, model__name=str(folder))
    with caplog.at_level(logging.INFO, "qpipe.kure"):
        run = plan_run(config)
    (term,) = run.weight_losses
    weights = {
        site.removesuffix(":weight") for site in run.plan.sites if ".layer." in site and site.endswith(":weight")
    }
    skipped = {name.removesuffix(".weight") for name in second}
    assert len(skipped) == 3 and len(weights) == 3 * 6
    assert {name for name in weights if term.applies(name)} == weights - skipped
    for name in skipped:
        assert re.search(rf"^ *{re.escape(name)} .*kurtosis above 100$", caplog.text, re.M), name


def test_patterns_are_named_as_reasons(tmp_path):
    plugin = chosen(make_run(tmp_path), include=["*d*", "ffn"], exclude=["ff*"])[1]
    assert [c.left_out for c in plugin.candidates] == ["", "not included by pattern", "excluded by pattern", ""]


def test_weights_in_another_form_are_measured_as_what_they_stand_for(tmp_path):
    run = make_run(tmp_path, planned=("embedding", "query"))
    cubed = SimpleNamespace(master=lambda value: value**3)
    run.instruments.quantizers = lambda: {"embedding:weight": cubed}
    plugin, _ = start(run)
    assert plugin.candidates[0].kurtosis == kurtosis(run.student["embedding"].weight ** 3)


def test_the_default_leaves_out_weights_with_outliers(tmp_path):
    plugin = Kure()
    (term,) = plugin.qpipe_weight_losses(make_run(tmp_path))
    assert term.applies("query") and not term.applies("ffn")


def test_only_the_first_process_logs(tmp_path, caplog):
    run = make_run(tmp_path)
    run.engine.rank = 1
    with caplog.at_level(logging.INFO, "qpipe.kure"):
        start(run)
    assert not caplog.records


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_an_error(option, tmp_path):
    with pytest.raises(SiteError, match=rf"kure\.{option}: 'valeu' matches no module"):
        start(make_run(tmp_path), **{option: ["valeu"]})


def test_nothing_to_regularize_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nothing to regularize: of 4 weights .*\(embedding, kurtosis above 0.1, not q"
    ):
        start(make_run(tmp_path), skip_above=0.1)
    with pytest.raises(ConfigError, match=r"nothing to regularize: .* left out \(embedding, not quantized\); quantize"):
        start(make_run(tmp_path, planned=("embedding",)))


def test_constant_weights_are_left_out(tmp_path):
    run = make_run(tmp_path)
    nn.init.zeros_(run.student["query"].weight)
    names, plugin = chosen(run)
    assert names == ["ffn"]
    assert (plugin.candidates[1].kurtosis, plugin.candidates[1].left_out) == (None, "constant")


def test_non_finite_weights_are_refused(tmp_path):
    run = make_run(tmp_path)
    nn.init.constant_(run.student["query"].weight, torch.inf)
    with pytest.raises(ModelError, match="weight of query holds NaN or infinity"):
        start(run)


def test_the_penalty_follows_the_options(tmp_path):
    weight = torch.randn(20, 20)
    _, term = start(make_run(tmp_path), target=3.0, weight=0.5, reduction="sum")
    assert (term.name, term.weight, term.reduction) == ("kure", 0.5, "sum")
    assert float(term.fn(moments([weight]))) == pytest.approx((kurtosis(weight) - 3.0) ** 2, rel=1e-4)
    _, linear = start(make_run(tmp_path), penalty="linear")
    assert float(linear.fn(moments([weight]))) == pytest.approx(kurtosis(weight), rel=1e-6)


def test_bad_options():
    with pytest.raises(ValidationError, match="target"):
        KureOptions(target=0.5)
    with pytest.raises(ValidationError, match="penalty"):
        KureOptions(penalty="cubic")


def test_resume_keeps_the_first_table_and_the_selection(tmp_path):
    run = make_run(tmp_path)
    plugin, _ = start(run, skip_above=100)
    state = plugin.qpipe_state(run)
    with torch.no_grad():
        run.student["query"].weight.pow_(3)
    again, _ = start(run, skip_above=100)
    assert again.candidates != plugin.candidates
    again.qpipe_restore(run, state)
    assert again.candidates == plugin.candidates
    other, _ = start(run)
    with pytest.raises(TrainingError, match="'ffn'"):
        other.qpipe_restore(run, state)


def test_a_finished_run_reports_the_kurtosis_before_training(tmp_path):
    run = make_run(tmp_path)
    plugin, _ = start(run, skip_above=100)
    plugin.qpipe_run_start(run)
    with torch.no_grad():
        run.student["query"].weight.pow_(3)
    run.trained = True
    finished, term = start(run, skip_above=100)
    assert finished.qpipe_export_metadata(run) == plugin.qpipe_export_metadata(run)
    assert term.applies("query") and not term.applies("ffn")


def test_report_shows_before_and_after(tmp_path):
    assert list(Kure().qpipe_report_sections(tmp_path)) == []
    run = make_run(tmp_path)
    plugin, _ = start(run, skip_above=100)
    plugin.qpipe_run_start(run)
    before, _ = Kure().qpipe_report_sections(tmp_path)
    assert before.html.count("<rect") == 4
    (tmp_path / "tensors.json").write_text(
        json.dumps([{"name": "query:weight", "kurtosis": 1.8123}, {"name": "ffn", "kurtosis": None}])
    )
    section, _ = Kure().qpipe_report_sections(tmp_path)
    assert section.html.count("<rect") == 5 and "1.812" in section.html and "kurtosis above 100" in section.html
    assert "<script" not in section.html and "http" not in section.html.replace("http://www.w3.org/2000/svg", "")
    (tmp_path / "kure.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"kure\.json is not valid JSON"):
        list(Kure().qpipe_report_sections(tmp_path))


def test_a_table_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    plugin, _ = start(run)
    plugin.qpipe_run_start(run=run)
    before = (tmp_path / "kure.json").read_text()

    def broken(self, text, **options):
        with open(self, "w") as file:
            file.write(text[:20])
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", broken)
    with pytest.raises(OSError, match="no space left"):
        plugin.qpipe_run_start(run=run)
    assert (tmp_path / "kure.json").read_text() == before
