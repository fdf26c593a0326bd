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


def take_stored(run: Run, wanted: Mapping[str, SqwqWeight]) -> None:
    """Overwrite P and gain of these sites with those in the folder that `model.name` names.

    Called before the engine wraps the model, so that everything is whole.

    Raises:
        ConfigError: there is no such file, or it lacks a site, or has it in another shape.
    """
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
