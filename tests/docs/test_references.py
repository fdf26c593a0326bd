"""Generated pages are up to date and complete; links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qpipe
from qpipe.config import RunConfig
from qpipe.hookspecs import Specs

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "docs" / "generate.py"
MARKDOWN = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("launch/*.md"),
    *ROOT.glob("plugins/*/README.md"),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generate():
    sys.path.insert(0, str(GENERATE.parent))
    try:
        yield importlib.import_module("generate")
    finally:
        sys.path.remove(str(GENERATE.parent))


def test_pages_are_up_to_date():
    done = subprocess.run([sys.executable, str(GENERATE), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed(generate, tmp_path, monkeypatch, capsys):
    pages = {tmp_path / "hooks.md": "new", tmp_path / "cli.md": "same", tmp_path / "missing.md": "text"}
    (tmp_path / "hooks.md").write_text("old")
    (tmp_path / "cli.md").write_text("same")
    monkeypatch.setattr(generate, "render", lambda: pages)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "hooks.md" in (message := capsys.readouterr().err) and "missing.md" in message and "cli.md" not in message
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_every_hook_is_documented_with_its_arguments():
    page = (ROOT / "docs" / "hooks.md").read_text()
    for name in (name for name in vars(Specs) if name.startswith("qpipe_")):
        arguments = [a for a in inspect.signature(getattr(Specs, name)).parameters if a != "self"]
        assert f"### `{name}({', '.join(arguments)})`" in page


def test_every_key_is_documented():
    page = (ROOT / "docs" / "config.md").read_text()
    for name, field in RunConfig.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{key}" for key in keys] if keys else [name]:
            assert f"| `{key}` |" in page


def test_classes_that_the_hook_page_names_are_public(generate):
    hooks = importlib.import_module("reference_hooks")
    for cls in hooks.CONTRIBUTIONS:
        assert getattr(qpipe, cls.__name__) is cls


def anchors(text: str) -> set[str]:
    """Fragments of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {"".join(c for c in h.lower().replace(" ", "-") if c.isalnum() or c in "-_") for h in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    broken = []
    for target in LINK.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)):
        path, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file.read_text())):
            broken.append(target)
    assert not broken


def test_readme_links_every_page():
    readme = (ROOT / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in readme, page.name


def test_demo_block(generate, demo_run, tmp_path):
    readme = (ROOT / "README.md").read_text()
    table = generate.demo_table(demo_run)
    results = json.loads((demo_run / "results.json").read_text())
    assert f"{results['evaluation']['accuracy']:.4f}" in table
    changed = generate.with_demo(readme, table)
    assert table in changed
    assert generate.with_demo(generate.with_demo(changed, "another table"), table) == changed
    with pytest.raises(ValueError, match="demo:start"):
        generate.with_demo("nothing here", table)
