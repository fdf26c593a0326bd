"""Observe: values at sites of a model that is not in training, over a few examples of the validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpipe.model.attention import AttentionSites
from qpipe.model.taps import Tap
from qpipe.quant.modules import QuantModule
from qpipe.run import Run
from qpipe.stages.calibrate import inference, inputs_of, to_device
from qpipe.types import TapStage

See = Callable[[Tensor], None]


@dataclass(frozen=True)
class Example:
    """One example of the validation split, without padding.

    Attributes:
        batch: what the model is called with; tensors of batch size 1.
        tokens: its tokens as text; empty where there is no tokenizer.
    """

    batch: dict[str, Tensor]
    tokens: list[str]


def examples(run: Run, count: int) -> list[Example]:
    """The first examples of the validation split, each by itself, so that none is padded."""
    return [example_of(run, number) for number in range(min(count, len(run.data.validation)))]


def example_of(run: Run, number: int) -> Example:
    """An example of the validation split, from 0."""
    rows: Any = run.data.validation
    batch = _unpadded(inputs_of(to_device(run.data.collate([rows[number]]), run)))
    return Example(batch, _tokens(run, batch))


def _unpadded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return batch
    kept = mask[0].bool()
    return {name: value[:, kept] if value.shape == mask.shape else value for name, value in batch.items()}


def _tokens(run: Run, batch: dict[str, Tensor]) -> list[str]:
    convert = getattr(run.data.tokenizer, "convert_ids_to_tokens", None)
    if convert is None or "input_ids" not in batch:
        return []
    return list(convert(batch["input_ids"][0].tolist()))


@contextmanager
def observing(run: Run, functions: Mapping[str, See]) -> Iterator[None]:
    """Within, each function sees the value at its site before it is quantized. No other tap acts.

    Args:
        run: a run on one process.
        functions: by site name; sites of weights see nothing.

    Raises:
        SiteError: the model has no such site.
    """
    spots = [run.instruments.module(site) for site in (run.instruments.site(name) for name in functions)]
    lists = [taps for module in run.student.modules() for taps in _tap_lists(module)]
    saved = [list(taps) for taps in lists]
    for taps in lists:
        taps.clear()
    for spot, (name, see) in zip(spots, functions.items(), strict=True):
        spot.taps_at(name.rpartition(":")[2]).append(Tap(TapStage.OBSERVE, _passing(see)))
    run.instruments.context.taps_active = True
    try:
        yield
    finally:
        run.instruments.context.taps_active = False
        for taps, before in zip(lists, saved, strict=True):
            taps[:] = before


def _tap_lists(module: Any) -> Sequence[list[Tap]]:
    if isinstance(module, AttentionSites):
        return list(module.taps.values())
    return list(module.qpipe.taps.values()) if isinstance(module, QuantModule) else []


def _passing(see: See) -> Callable[[Tensor], Tensor]:
    def passed(x: Tensor) -> Tensor:
        see(x.detach())
        return x

    return passed


def collect(run: Run, names: Sequence[str], sample: Iterable[Example]) -> dict[str, list[Tensor]]:
    """Values at sites, one `[...]` without batch axis per example, in float32 on the CPU.

    A site that runs several times per pass gives the last value; one that never runs is left out.
    """
    found: dict[str, list[Tensor]] = {}
    now: dict[str, Tensor] = {}

    def keep(name: str) -> See:
        return lambda x: now.__setitem__(name, x)

    with observing(run, {name: keep(name) for name in names}), inference(run):
        for example in sample:
            now.clear()
            run.student(**example.batch)
            for name, value in now.items():
                found.setdefault(name, []).append(value[0].to("cpu", torch.float32))
    return found
