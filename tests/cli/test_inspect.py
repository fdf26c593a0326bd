import json
import os
import sys
import time
import types
from types import SimpleNamespace

import pytest

from qpipe import ModelMap, Options
from qpipe.launching import failures


class Grid(Options):
    bits: int = 4
    granularity: str = "channel"
    symmetric: bool = True
    group: int | None = None


@pytest.fixture
def stages(monkeypatch):
    """Stand-ins for the stages, which have their own tests; they keep what they were called with."""
    calls = []
    sites = {
        "block.0.query:weight": SimpleNamespace(quantizer="uniform", bits=4, granularity="channel", options=Grid())
    }
    module = types.ModuleType("qpipe.stages")
    instruments = SimpleNamespace(map=ModelMap())
    run = SimpleNamespace(plan=SimpleNamespace(sites=sites), instruments=instruments)
    module.plan_run = lambda config: calls.append(config) or run
    module.evaluate_run = lambda run: calls.append(run) or {"accuracy": 0.875}
    module.export_run = lambda run, format, out: calls.append((run, format, out)) or out
    monkeypatch.setitem(sys.modules, "qpipe.stages", module)
    return calls


def test_plan(cli, stages, config_file):
    result = cli("inspect", "plan", config_file, "--set", "seed=3")
    assert result.code == 0 and stages[0].seed == 3
    header, row, count = (line.split() for line in result.out.splitlines())
    assert header == ["SITE", "QUANTIZER", "BITS", "GRANULARITY", "OPTIONS"]
    assert row == ["block.0.query:weight", "uniform", "4", "channel", "symmetric=True"]
    assert " ".join(count) == "1 sites: 1 weights, 0 activations"


def test_plan_as_json_with_the_configuration(cli, stages, config_file):
    value = json.loads(cli("inspect", "plan", config_file, "--json", "--config").out)
    assert value["config"]["model"]["name"] == "some/model"
    assert value["sites"][0]["bits"] == 4
    assert json.loads(cli("inspect", "plan", config_file, "--json").out) == value["sites"]


def test_plan_and_sites_of_a_real_model(cli, tmp_path):
    from qpipe.config import dump
    from qpipe.testing import tiny_config

    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_config(tmp_path)))
    plan = json.loads(cli("inspect", "plan", path, "--json").out)
    embedding = next(row for row in plan if row["site"] == "bert.embeddings.word_embeddings:weight")
    assert (embedding["bits"], embedding["granularity"]) == (8, "channel")
    sites = json.loads(cli("inspect", "plan", path, "--sites", "--json", "--set", "quantization.preset=no-such").out)
    assert {"bert.encoder.layer.0.attention.self:probs", "classifier:input"} <= {row["site"] for row in sites}
    assert {row["site"] for row in plan} < {row["site"] for row in sites}


@pytest.mark.parametrize(("blocks", "activations"), [(2, 31), (12, 161)], ids=["two blocks", "as many as BERT-base"])
def test_the_plan_counts_activations_by_role(cli, tmp_path, blocks, activations):
    from qpipe.config import dump
    from qpipe.testing import tiny_config, tiny_model

    path = tmp_path / "tiny.yaml"
    config = tiny_config(tmp_path, quantization__preset="w8a8-outputs", export__format="native")
    path.write_text(dump(config))
    model = f"model.name={tiny_model(tmp_path / 'deep', num_hidden_layers=blocks)}"
    rows = json.loads(cli("inspect", "plan", path, "--json", "--set", model).out)
    roles = [row["role"] for row in rows]
    # Activations: 13 in a block; three at the embeddings, pooler and logits.
    # Weights: six maps and two normalisations in a block; three tables and their normalisation, pooler and head.
    weights = blocks * (6 + 2) + 3 + 2 + 1
    assert activations == blocks * 13 + 3 + 2 == len(roles) - roles.count("weight")
    assert roles.count("weight") == weights
    assert roles.count("ffn_sum") == roles.count("scores") == blocks and roles.count("embedding_sum") == 2
    lines = [line.split() for line in cli("inspect", "plan", path, "--set", model).out.splitlines()]
    assert [f"{activations + weights}", "sites:", f"{weights}", "weights,", f"{activations}", "activations"] in lines
    assert ["ffn_sum", f"{blocks}"] in lines and ["logits", "1"] in lines and ["weight", f"{weights}"] not in lines


@pytest.mark.parametrize(("preset", "wide"), [("w8a8-mixed-sum", 12), ("w8a8-mixed-ffn", 36), ("w8a8-mixed", 37)])
def test_presets_of_mixed_precision_at_the_depth_of_bert_base(cli, tmp_path, preset, wide):
    from qpipe.config import dump
    from qpipe.testing import tiny_config, tiny_model

    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_config(tmp_path, quantization__preset=preset, export__format="native")))
    model = f"model.name={tiny_model(tmp_path / 'deep', num_hidden_layers=12)}"
    rows = [r for r in json.loads(cli("inspect", "plan", path, "--json", "--set", model).out) if r["role"] != "weight"]
    assert [row["bits"] for row in rows].count(16) == wide and [row["bits"] for row in rows].count(8) == 161 - wide


def test_evaluate_and_export(cli, stages, tmp_path):
    assert cli("evaluate", tmp_path).out.split() == ["METRIC", "VALUE", "accuracy", "0.875"]
    assert json.loads(cli("evaluate", tmp_path, "--json").out) == {"accuracy": 0.875}
    assert cli("export", tmp_path, "--format", "native", "--out", tmp_path / "e").out.strip() == str(tmp_path / "e")
    assert stages[-1] == (tmp_path, "native", tmp_path / "e")


@pytest.mark.parametrize("passed", [True, False])
def test_verify_exit_code(cli, monkeypatch, tmp_path, passed):
    module = types.ModuleType("qpipe.export.verify")
    verdict = SimpleNamespace(passed=passed, lines=lambda: ["weights: difference 0"])
    module.verify = lambda directory, trust_remote_code: verdict
    monkeypatch.setitem(sys.modules, "qpipe.export.verify", module)
    result = cli("verify", tmp_path)
    assert (result.code, result.out) == (0 if passed else 1, "weights: difference 0\n")


def test_run_summary(cli, config_file, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/step-10").mkdir(parents=True)
    (run / "export").mkdir()
    (run / "export/model.safetensors").write_bytes(bytes(2_500_000))
    (run / "config.yaml").write_text(config_file.read_text())
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "eval": {"accuracy": 0.5}}\n{"step": 3, "lo'
    )
    (run / "results.json").write_text('{"student": {"accuracy": 0.75}}')
    failures.record(run, 1, ValueError("odd"))
    summary = json.loads(cli("inspect", "run", run, "--json").out)
    assert summary["run"]["checkpoints"] == "step-10" and summary["run"]["export"] == "2.50 MB"
    assert summary["last metrics"] == {"step": 2, "loss": 2.0, "eval.accuracy": 0.5}
    assert summary["results"] == {"student.accuracy": 0.75}
    assert summary["failure"] == {"rank": 1, "error": "ValueError", "message": "odd"}
    assert "student.accuracy  0.75" in cli("inspect", "run", run).out


def test_a_failure_before_the_results_is_over(cli, config_file, tmp_path):
    """`qpipe train` and other launchers leave the note of an earlier start."""
    (tmp_path / "config.yaml").write_text(config_file.read_text())
    failures.record(tmp_path, 0, ValueError("odd"))
    assert "failure" in json.loads(cli("inspect", "run", tmp_path, "--json").out)
    (tmp_path / "results.json").write_text('{"student": {"accuracy": 0.75}}')
    later = time.time() + 60
    os.utime(tmp_path / "results.json", (later, later))
    assert "failure" not in json.loads(cli("inspect", "run", tmp_path, "--json").out)


def test_run_summary_of_something_else(cli, tmp_path):
    result = cli("inspect", "run", tmp_path)
    assert result.code == 1 and "is not a run directory" in result.err


def test_damaged_metrics(cli, config_file, tmp_path):
    (tmp_path / "config.yaml").write_text(config_file.read_text())
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\nnoise\n{"a": 2}\n')
    result = cli("inspect", "run", tmp_path)
    assert result.code == 1 and "metrics.jsonl, line 2" in result.err


def test_checkpoint_rows_may_differ(cli, monkeypatch, tmp_path):
    module = types.ModuleType("qpipe.export.inspect")
    module.describe = lambda directory: [{"name": "a", "bits": 4}, {"name": "b", "shape": [2, 3]}]
    monkeypatch.setitem(sys.modules, "qpipe.export.inspect", module)
    lines = cli("inspect", "checkpoint", tmp_path).out.splitlines()
    assert [line.split() for line in lines] == [["NAME", "BITS", "SHAPE"], ["a", "4"], ["b", "[2,", "3]"]]
