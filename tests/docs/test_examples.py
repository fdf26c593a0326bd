"""The plugins that the guides show do what the guides say, in real runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer

import qpipe
from qpipe.config import resolve
from qpipe.data.loading import find_task
from qpipe.host import load_plugins
from qpipe.quant.presets import preset_rules
from qpipe.stages.evaluate import evaluate
from qpipe.stages.execute import assemble, record_start
from qpipe.stages.train import train
from qpipe.testing import tiny_config
from qpipe.testing.tiny import tiny_slot_data

ROOT = Path(__file__).resolve().parents[2]


def python_of(page: str) -> dict[str, Any]:
    """Everything that the python blocks of a page define."""
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for text in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S):
        exec(compile(text, page, "exec", dont_inherit=True), namespace)
    return namespace


def trained(folder: Path, plugins: dict[str, Any], **changes: Any) -> Any:
    """A tiny run that has trained with plugin objects; its teacher is another model."""
    config = tiny_config(folder, teacher__name=str(folder / "teacher"), train__max_steps=2, **changes)
    run = assemble(config, load_plugins({}, extra=plugins.items()), {})
    record_start(run)
    train(run)
    return run


@pytest.mark.parametrize("used", [["match", "replace"], ["match"], ["replace"]])
def test_attention_guide(used, tmp_path):
    made = python_of("docs/attention.md")
    replace = made["TeacherContexts"](made["TeacherContexts"].Options(steps=1))
    plugins = {"match": made["MatchContexts"](), "replace": replace}
    run = trained(tmp_path, {name: plugins[name] for name in used})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count('"contexts"') == 2 * ("match" in used)
    assert run.results["steps"] == 2


def test_writing_guide(tmp_path):
    made = python_of("docs/writing-a-plugin.md")
    rule = {"site": "{block}.*:weight", "quantizer": "power-of-two", "options": {"bits": 3}}
    run = trained(tmp_path, {"p": made["PowerPlugin"](), "d": made["LogitDistillation"]()}, quantization__rules=[rule])
    planned = [entry for entry in run.plan.sites.values() if entry.quantizer == "power-of-two"]
    assert len(planned) == 12 and {entry.bits for entry in planned} == {3}
    assert '"logit-mse"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_tasks_guide(tmp_path):
    """Sentences are understood through the export as the metrics of the run decode them, intents and tags."""
    data = tiny_slot_data(tmp_path / "slots.jsonl")
    changes = {"train__learning_rate": 1e-2, "train__max_steps": 60, "train__eval_every": 60, "data__max_length": 24}
    config = tiny_config(tmp_path, task="intent-slot", data__train=str(data), data__validation=str(data), **changes)
    run = qpipe.execute(config)
    seen, decode = [], run.data.decode
    run.data = replace(run.data, decode=lambda *ids: seen.append(decode(*ids)) or seen[-1])
    metrics = evaluate(run)
    assert metrics == run.results["evaluation"] and metrics["exact_match"] > 0.1
    model = AutoModelForTokenClassification.from_pretrained(run.out / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.out / "export")
    understand = python_of("docs/tasks.md")["understand"]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row, predicted, expected in zip(rows, *seen[0], strict=True):
        intent, *tags = predicted[expected != ""]
        assert [*expected[expected != ""]] == [f"intent:{row['intent']}", *row["slot_tags"]]
        assert understand(model, tokenizer, row["tokens"]) == (intent.removeprefix("intent:"), tags), row


RECIPES = [path for path in sorted(ROOT.glob("examples/**/*.yaml")) if path.name not in ("table.yaml", "expected.yaml")]
"""All but the files of tables of results, which tests/test_results.py reads."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.relative_to(ROOT / "examples").parts))
def test_recipes_are_valid(path):
    """Every key, plugin option and task exists, and so does the file that the recipe's own command names."""
    config = resolve(path)
    host = load_plugins(config.plugins)
    find_task(host.collect("qpipe_tasks"), config.task)
    preset_rules(config.quantization.preset)
    name = path.relative_to(ROOT)
    assert re.search(rf"qpipe (launch|quantize MODEL) {re.escape(str(name))}", path.read_text())


def test_zero_guide(tmp_path, capsys):
    trained(tmp_path, {"range": python_of("docs/zero.md")["LogRange"]()})
    largest = re.search(r"largest weight: ([\d.]+)", capsys.readouterr().out)
    assert largest and float(largest.group(1)) > 0


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The README's plugin, built and installed into a folder of its own; returns its source and an environment."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("grid")
    pattern = r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$"
    for name, text in re.findall(pattern, (ROOT / "README.md").read_text(), re.M | re.S):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(folder / "qpipe-grid")], check=True)
    return folder / "qpipe-grid", {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_readme_plugin_is_found(grid):
    _, env = grid
    done = subprocess.run(
        [sys.executable, "-m", "qpipe.cli", "plugins", "check"], env=env, capture_output=True, text=True
    )
    assert "ok    grid (qpipe-grid 0.1.0): qpipe_weight_losses" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_readme_plugin_keeps_the_contract(grid):
    folder, env = grid
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
