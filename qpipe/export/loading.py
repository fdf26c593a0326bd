"""Whether stock transformers can load a model with packed weights, found out before training and without values."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from qpipe.export.companions import plain_class
from qpipe.export.compressed import quantization_config
from qpipe.export.record import PlannedSite
from qpipe.export.schemes import NATIVE_HINT, PACKED, STORED_AS, Scheme

BITS = 8
"""Of the weights that are tried; which modules have packed weights decides, not how many bits."""


def loading_problem(model: Any, sites: Iterable[PlannedSite], state: Mapping[str, Tensor]) -> str | None:
    """Why `from_pretrained` could not load the export of a model; None if it can.

    Some families read `weight` of every linear map while they load, and packed ones have none; of others transformers
    itself converts the names of the weights. All of that shows with tensors that have shapes and no values.

    Args:
        model: the student.
        sites: planned; all of them can be held by the format.
        state: every parameter and saved buffer of the model, without what qpipe added.
    """
    kinds = {site.path: site.module_type for site in sites if site.slot == "weight"}
    plain = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    packed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        path, _, local = name.rpartition(".")
        packed |= _stored(path, kinds[path], tensor) if local == "weight" and path in kinds else {name: tensor}
    cls, config = plain_class(model), type(model.config).from_dict(model.config.to_dict())
    if getattr(config, "tie_word_embeddings", False) and any(name not in packed for name in plain):
        config.tie_word_embeddings = False  # as in the export, where a packed weight is tied
    quantized = copy.deepcopy(config)
    schemes = {path: Scheme(STORED_AS[kind], BITS, "channel", None, True) for path, kind in kinds.items()}
    quantized.quantization_config = quantization_config(schemes, model)
    problem = _attempt(cls, quantized, packed, kinds)
    if problem is None or _attempt(cls, config, plain, kinds) is not None:  # packing is not what is in the way
        return None
    return (
        f"{cls.__name__} cannot be loaded by transformers with packed weights, so that nobody could use the export: "
        f"{problem}; {NATIVE_HINT}"
    )


def _stored(path: str, kind: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight in the file, without values."""
    rows, columns = weight.shape
    scale = {f"{path}.weight_scale": torch.empty(rows, 1, dtype=weight.dtype, device="meta")}
    if STORED_AS[kind] != PACKED:
        return {f"{path}.weight": torch.empty(rows, columns, dtype=torch.int8, device="meta"), **scale}
    words = -(-columns // (32 // BITS))
    return {
        f"{path}.weight_packed": torch.empty(rows, words, dtype=torch.int32, device="meta"),
        f"{path}.weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        **scale,
    }


def _attempt(cls: Any, config: Any, tensors: Mapping[str, Tensor], packed: Mapping[str, str]) -> str | None:
    """What goes wrong when a model is loaded from tensors without values."""
    try:
        with _quiet():
            _, info = cls.from_pretrained(
                None, config=config, state_dict=dict(tensors), device_map={"": "meta"}, output_loading_info=True
            )
    except Exception as error:  # whatever the code of a family raises, verification would meet as well
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    left = sorted(key for key in (*info["missing_keys"], *info["unexpected_keys"]) if key.rpartition(".")[0] in packed)
    return f"{left[0]} is not loaded" if left else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notices of a real loading."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
