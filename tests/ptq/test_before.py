"""What is wrong shows before anything is evaluated or rounded."""

import importlib

import pytest

from qpipe import ConfigError, DataError
from qpipe.stages import execute, quantize
from qpipe.testing import tiny_config

QUICK = {"examples": 64, "batch_size": 16, "iterations": 100}


def module(name):
    """A stage's module; the package's attribute of that name is the function."""
    return importlib.import_module(f"qpipe.stages.{name}")


def config(folder, **ptq):
    return tiny_config(folder, quantization__preset="w3", quantization__ptq={**QUICK, "weights": "adaround", **ptq})


def test_too_few_examples_show_before_anything_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(module("quantize"), "evaluate", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(DataError, match="quantization.ptq.examples 300 exceeds the 128 training examples; lower it"):
        quantize(config(tmp_path, examples=300))


def test_what_is_wrong_with_the_training_shows_before_weights_are_rounded(tmp_path, monkeypatch):
    def collide(_):
        raise ConfigError("no loss is left")

    monkeypatch.setattr(module("execute"), "initialize", lambda _: pytest.fail("rounded"))
    monkeypatch.setattr(module("execute"), "collect_losses", collide)
    with pytest.raises(ConfigError, match="no loss is left"):
        execute(config(tmp_path))
