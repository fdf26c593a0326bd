"""Going on from the P and gains of an earlier run, for example at another width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from qpipe import ConfigError, Run
from qpipe_sqwq.quantizer import SqwqWeight

FILE = "quantizers.safetensors"
"""Beside the weights in `runs/NAME/model`: `SITE/stored_weight` (P) and `SITE/gain` of every squashed weight."""


def refuse_another_model(run: Run) -> None:
    """Refuse what would put P and gains of one model among the weights of another.

    Raises:
        ConfigError: the student starts from a teacher, or has some of the model's layers only.
    """
    config = run.config
    if run.teacher is not None and config.teacher.init_student:
        raise ConfigError(
            "sqwq: init: stored reads P and gains from the folder that model.name names, but teacher.init_student is "
            "true, so that all other weights are the teacher's; set teacher.init_student=false, or choose another init"
        )
    if config.model.weights == "random":
        raise ConfigError(
            "sqwq: init: stored reads P and gains from the folder that model.name names, but model.weights is random, "
            "so that no other weight is read from there; leave model.weights out, or choose another init"
        )
    if config.model.keep_layers is not None:
        raise ConfigError(
            f"sqwq: init: stored reads P and gains by the names of their layers, and model.keep_layers "
            f"{list(config.model.keep_layers)} gives the layers other numbers; leave model.keep_layers out (an earlier "
            "run with it has left a model of those layers), or choose another init"
        )


def take_stored(run: Run, wanted: Mapping[str, SqwqWeight]) -> None:
    """Overwrite P and gain of these sites with those in the folder that `model.name` names.

    Called before the engine wraps the model, so that everything is whole.

    Raises:
        ConfigError: the rest of the model is not from that folder, or its layers are others; there is no such file, or
            it lacks a site, or has it in another shape.
    """
    refuse_another_model(run)
    path = Path(run.config.model.name) / FILE
    if not path.is_file():
        raise ConfigError(
            f"sqwq: init: stored goes on from P and gains of an earlier run, but {path} does not exist; set model.name "
            "to the model folder of a run with sqwq (runs/NAME/model), or choose another init"
        )
    state = load_file(path)
    for site, quantizer in wanted.items():
        weight = run.student.get_parameter(f"{site.removesuffix(':weight')}.weight")
        for target, key in ((weight, f"{site}/stored_weight"), (quantizer.gain, f"{site}/gain")):
            found = state.get(key)
            if found is None or found.shape != target.shape:
                has = "nothing" if found is None else f"shape {tuple(found.shape)}, not {tuple(target.shape)},"
                raise ConfigError(
                    f"sqwq: init: stored finds {has} under {key} in {path}; squash the weights that the earlier run "
                    "squashed, with its granularity, or choose another init for that site"
                )
            with torch.no_grad():
                target.copy_(found)
    run.instruments.context.weights_changed()
