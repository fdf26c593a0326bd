"""`qpipe quantize`: which model, task and plan it takes, and what it leaves."""

import json
from pathlib import Path

import pytest

from qpipe.config import dump
from qpipe.errors import ConfigError
from qpipe.launching.quantize import configuration, model_folder
from qpipe.stages import execute
from qpipe.testing import tiny_config


def made_by_a_run(folder: Path, name: str = "model") -> Path:
    """A run directory with a model in it, and with one below `teacher`."""
    for path in (folder / name, folder / "teacher" / "model"):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    config = tiny_config(folder / "files", {"kure": {}}, quantization__preset="w3", seed=7, data__max_length=99)
    (folder / "config.yaml").write_text(dump(config))
    return folder


def test_task_data_and_plan_come_from_the_run_that_made_the_model(tmp_path):
    run = made_by_a_run(tmp_path / "mine")
    for given, folder in (
        (run, run / "model"),
        (run / "model", run / "model"),
        (run / "teacher", run / "teacher/model"),
    ):
        config = configuration(str(given), None, [], [], None)
        assert config.model.name == str(folder)
        assert (config.quantization.preset, config.seed, config.data.max_length) == ("w3", 7, 99)
        assert config.plugins == {}, "they belonged to the training"
        assert config.out == "runs/quantized"


def test_a_file_and_overrides_come_before_the_run(tmp_path):
    run = made_by_a_run(tmp_path / "mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {name: other, tokenizer: words}, task: rte, out: runs/rte}")
    config = configuration(str(run), recipe, ["quantization.preset=w2", "quantization.ptq.weights=lapq"], [], None)
    assert (config.model.name, config.model.tokenizer, config.task) == (str(run / "model"), "words", "rte")
    assert (config.quantization.preset, config.quantization.ptq.weights) == ("w2", "lapq")
    assert config.out == "runs/rte"
    assert configuration(str(run), recipe, [], [], Path("20261122")).out == "20261122"


@pytest.mark.parametrize("with_recipe", [True, False])
def test_the_run_directory_can_be_an_override(tmp_path, with_recipe):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {name: other}, task: rte, out: runs/rte}")
    source = recipe if with_recipe else None
    assert configuration("some/model", source, ["out=runs/set"], [], None).out == "runs/set"
    assert configuration("some/model", source, ["out=runs/set"], [], Path("runs/given")).out == "runs/given"
    run = made_by_a_run(tmp_path / "mine")
    with pytest.raises(ConfigError, match="holds the model that is to be quantized"):
        configuration(str(run), source, [f"out={run}"], [], None)


def test_other_models_take_the_built_in_recipe(tmp_path):
    config = configuration("some/model", None, [], [], None)
    assert (config.model.name, config.task, config.quantization.preset) == ("some/model", "classification", "w4a8")
    (tmp_path / "config.yaml").write_text("{task: rte, model: {name: x}}")
    lone = tmp_path / "lone"
    lone.mkdir()
    assert configuration(str(lone), None, [], [], None).task == "classification", "its parent is no run of it"
    assert model_folder(tmp_path / "nothing") is None


def test_a_recipe_that_left_layers_out_describes_the_model_it_made(tmp_path):
    run = made_by_a_run(tmp_path / "mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {name: other, keep_layers: every-other}, task: rte}")
    config = configuration(str(run), recipe, [], [], None)
    assert (config.model.name, config.model.keep_layers) == (str(run / "model"), None)


def test_an_override_cannot_name_another_model(tmp_path):
    with pytest.raises(ConfigError, match="the one to quantize is 'some/hub-model', the first argument"):
        configuration("some/hub-model", None, ["seed=1", "model.name=other"], [], None)
    with pytest.raises(ConfigError, match="names the model 'other'"):
        configuration("some/hub-model", None, ["model={name: other}"], [], None)


def test_the_revision_is_that_of_the_model_that_the_recipe_names(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {name: some/hub, revision: v2}, task: rte}")
    assert configuration("some/hub", recipe, [], [], None).model.revision == "v2"
    assert configuration("some/other", recipe, [], [], None).model.revision is None
    assert configuration(str(made_by_a_run(tmp_path / "mine")), recipe, [], [], None).model.revision is None


def test_the_models_own_run_is_not_written_to(tmp_path):
    run = made_by_a_run(tmp_path / "mine")
    with pytest.raises(ConfigError, match="holds the model that is to be quantized; choose another --out"):
        configuration(str(run), None, [], [], run)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["some/model", "-s", "quantization.ptq.weights=adarond"], 1, "quantization.ptq.weights = 'adarond'"),
        (["some/model", "-s", "quantization.preset=w5"], 1, "quantization.preset 'w5' is unknown"),
        (["some/model", "absent.yaml"], 1, "configuration 'absent.yaml' does not exist"),
        (["some/model", "--plugins", "kuree"], 1, "no plugin named 'kuree' is installed; did you mean 'kure'"),
        ([], 2, "Missing argument 'MODEL'"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(cli, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    result = cli("quantize", *words)
    assert result.code == code and message in result.err
    assert not list(tmp_path.iterdir())


def test_a_trained_run_is_quantized_again(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(tiny_config(tmp_path, quantization__preset=None, train__max_steps=2, train__eval_every=2))
    result = cli("quantize", "run", "--set", "quantization.preset=w4", "--out", "packed")
    assert result.code == 0, result.err
    assert "Result of packed" in result.out and "exported and verified: packed/export" in result.out
    results = json.loads((tmp_path / "packed" / "results.json").read_text())
    assert results["verified"] and results["evaluation"]["accuracy"] == results["reloaded"]["accuracy"]
    for command in (["evaluate", "packed"], ["inspect", "run", "packed"], ["report", "packed"]):
        assert cli(*command).code == 0, command
    assert (tmp_path / "packed" / "report.html").stat().st_size > 10_000
    again = cli("quantize", "run", "--set", "quantization.preset=w4", "--out", "packed")
    assert again.code == 1 and "run directory packed is already in use: it holds results.json; choose" in again.err
    (tmp_path / "packed" / "results.json").unlink()  # as where it was killed while it verified
    repeated = cli("quantize", "run", "--set", "quantization.preset=w4", "--out", "packed")
    assert repeated.code == 0, repeated.err
    assert json.loads((tmp_path / "packed" / "results.json").read_text())["evaluation"] == results["evaluation"]
