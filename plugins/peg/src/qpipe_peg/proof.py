"""Proof that a rewritten network computes the same integers: both run in float64 on the reference examples.

In float64 sums in another order differ by less than any rounding to codes could notice; in the export's own type a
value next to the border of two codes may fall on its other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import ExportRecord, FormatError, plain_model, quantize_activations
from qpipe_peg.rewriting import FeedForward, feed_forwards, rewrite

TOLERANCE = 1e-9
"""Of logits, relative to the largest: a single other integer anywhere moves them by far more."""


def require_equal(record: ExportRecord) -> None:
    """Compare the model with groups and the rewritten one: every value at x, h and y, and the logits.

    Args:
        record: with reference examples.

    Raises:
        FormatError: they differ; says where. Or the model cannot be rewritten.
    """
    activations = [site.record() for site in record.activations]
    model = plain_model(record).double()
    layers = feed_forwards(model, activations)
    quantize_activations(model, activations)
    expected = _values(model, layers, record.reference, rewritten=False)
    model = plain_model(record).double()
    quantize_activations(model, rewrite(model, activations))
    found = _values(model, layers, record.reference, rewritten=True)
    for name, value in expected.items():
        same = torch.equal(found[name], value) if name else _close(found[name], value)
        if not same:
            raise FormatError(
                f"{name or 'logits'}: the rewritten network computes other values than the model with groups; use "
                "export.format: native, and report this"
            )


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max().clamp_min(1))  # NaN is not close to anything


def _values(
    model: nn.Module, layers: list[FeedForward], reference: Mapping[str, Tensor], rewritten: bool
) -> dict[str, Tensor]:
    """Quantized values of every site with groups, features in order; and logits, under an empty name."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, order: list[int] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            value = args[0] if output is None else output
            kept[name] = value if order is None else value[..., order]

        return hook

    for layer in layers:
        for site in (layer.x, layer.h, layer.y):
            name = f"{site['module']}:{site['slot']}"
            if rewritten:
                module = model.get_submodule(f"{site['module']}.quantizers")
                module.register_forward_hook(keep(name, None))
            elif site["slot"] == "input":  # after the hook that quantizes it
                model.get_submodule(site["module"]).register_forward_pre_hook(keep(name, site["order"]))
            else:
                model.get_submodule(site["module"]).register_forward_hook(keep(name, site["order"]))
    inputs: dict[str, Any] = {k.removeprefix("inputs."): v for k, v in reference.items() if k.startswith("inputs.")}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return {**kept, "": logits}
