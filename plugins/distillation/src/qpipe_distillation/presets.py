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
_FIRST = {"schedule": "step", "initial": 1.0, "final": 0.0, "start": 20 / 23}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ternarybert": {**_ALL_LAYERS, "score_floor": -100.0},
    "xtc": _ALL_LAYERS,
    "tinybert": {
        **_ALL_LAYERS,
        "score_floor": -100.0,
        "hidden_weight": _FIRST,
        "attention_weight": _FIRST,
        "logits_weight": {**_FIRST, "initial": 0.0, "final": 1.0},
    },
}
"""Options that a preset sets, where the user does not.

`ternarybert`: Zhang et al., "TernaryBERT" (2020), as its code has it. `xtc`: Wu et al., "Extreme Compression for
Pre-trained Transformers Made Simple and Efficient" (2022), likewise. `tinybert`: Jiao et al., "TinyBERT" (2020),
distillation on a task: the layers for 20 epochs, then the logits for 3, with the means of their code.
"""
