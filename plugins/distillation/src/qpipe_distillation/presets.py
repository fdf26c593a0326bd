"""Published recipes, as options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALL_LAYERS = {
    "logits": "soft-ce",
    "classes": "mean",
    "temperature": 1.0,
    "hidden": "mse",
    "attention": "mse",
    "padding": "include",
    "task_loss": False,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ternarybert": {**_ALL_LAYERS, "score_floor": -100.0},
    "xtc": {**_ALL_LAYERS, "masked_keys": "compare"},
    "tinybert": {**_ALL_LAYERS, "score_floor": -100.0, "two_step": True, "fraction": 20 / 23},
}
"""Options that a preset sets, where the user does not.

`ternarybert`: Zhang et al., "TernaryBERT" (2020), as its code has it. `xtc`: Wu et al., "Extreme Compression for
Pre-trained Transformers Made Simple and Efficient" (2022), likewise: it adds one mask to the scores of both models,
which drops out of their difference, so that masked keys are compared too. `tinybert`: Jiao et al., "TinyBERT" (2020),
distillation on a task: the layers for 20 epochs, then, in a second training, the logits for 3, with the means of their
code.
"""

STEPS = ("steps", "fraction", "learning_rate", "warmup")
"""Options that belong to `two_step`."""

PADDED = ("score_floor", "masked_keys")
"""Options that belong to `padding: include`."""


def filled_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's options, under those that are given, without what belongs to something that is not wanted."""
    found = dict(PRESETS.get(str(given.get("preset")), {}))
    left_out = (*(STEPS if given.get("two_step") is False else ()),
                *(PADDED if given.get("padding") == "exclude" else ()))  # fmt: skip
    return {**{name: value for name, value in found.items() if name not in left_out}, **given}
