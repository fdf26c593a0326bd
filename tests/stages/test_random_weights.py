"""Pre-training: `model.weights: random` starts from the architecture's own initialisation."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import qpipe
from qpipe import ConfigError
from qpipe.export.verify import verify
from qpipe.launching.quantize import configuration
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash
from qpipe.testing.tiny import VOCABULARY

STEPS = 60


def config_of(folder, **changes):
    usual = {"task": "masked-lm", "data__text_columns": ["sentence"], "model__weights": "random"}
    return tiny_config(folder, **{**usual, "train__max_steps": 2, "train__eval_every": 2, **changes})


def without_checkpoint(folder):
    """The folder of the model keeps its configuration and tokenizer."""
    tiny_config(folder)
    (folder / "model" / "model.safetensors").unlink()


def test_a_model_is_pre_trained_quantized_from_its_configuration_alone(tmp_path):
    """At first every word is as likely as any other (pieces of which no word is hidden have a loss of 0). The export
    says nothing of a base model, and verifies."""
    without_checkpoint(tmp_path)
    changes = {"train__max_steps": STEPS, "train__eval_every": STEPS, "train__learning_rate": 1e-2}
    run = qpipe.execute(config_of(tmp_path, **changes))
    first = json.loads((run.out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["task"] == pytest.approx(math.log(len(VOCABULARY)), rel=0.2)
    assert run.results["evaluation"]["perplexity"] < 0.9 * len(VOCABULARY)  # its special tokens are never hidden
    record = json.loads((run.out / "export" / "qpipe.json").read_text())
    assert record["base_model"] is None
    assert verify(run.out / "export").passed


def test_the_seed_decides_and_the_checkpoint_does_not(tmp_path, fast):
    """The same run from a folder with weights and from one without."""
    bare, full = tmp_path / "bare", tmp_path / "full"
    without_checkpoint(bare)
    one, two = (qpipe.execute(config_of(folder)) for folder in (bare, full))
    other = qpipe.execute(config_of(full, seed=1, out=str(full / "other")))
    start = qpipe.execute(config_of(full, model__weights="pretrained", out=str(full / "pretrained")))
    assert weights_hash(one.out) == weights_hash(two.out)
    assert len({weights_hash(run.out) for run in (one, other, start)}) == 3


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def close(one, other):
    """No weight differs by more than a learning rate of next to nothing moves it."""
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-7) for name in one)


def test_a_teacher_made_by_the_run_is_pre_trained_first(tmp_path, fast):
    """The student then starts from it, or from random weights of its own: those of a run without a teacher."""
    changes = {
        "train__max_steps": 1,
        "train__learning_rate": 1e-9,
        "teacher__epochs": 1,
        "teacher__learning_rate": 1e-2,
    }
    saved = {"alone": weights(qpipe.execute(config_of(tmp_path, **changes, out=str(tmp_path / "alone"))).out)}
    for name, init in (("copy", True), ("own", False)):
        plugins, out = {"distillation": {}}, str(tmp_path / name)
        config = config_of(tmp_path, plugins=plugins, **changes, teacher__init_student=init, out=out)
        run = qpipe.execute(config)
        assert set(run.results["teacher"]) == {"perplexity", "masked_accuracy"}
        saved[name], saved[f"{name} teacher"] = weights(run.out), weights(run.out / "teacher")
    assert close(saved["copy"], saved["copy teacher"]) and close(saved["own teacher"], saved["copy teacher"])
    assert close(saved["own"], saved["alone"]) and not close(saved["own"], saved["own teacher"])


def test_a_student_cannot_start_from_two_models(tmp_path):
    teacher = str(tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"random, but the student would start .*teacher.init_student: false"):
        config_of(tmp_path, teacher__name=teacher)
    assert config_of(tmp_path, teacher__name=teacher, teacher__init_student=False).model.weights == "random"


def test_quantize_takes_the_trained_weights(tmp_path):
    """A recipe that made a model from random weights says which task and data it is for."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: shape, weights: random}\ntask: masked-lm\n")
    config = configuration(str(tmp_path / "trained"), recipe, [], [], tmp_path / "out")
    assert config.model.weights == "pretrained"
