"""The quantized layers of a model one by one, with what reaches them on calibration data."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpipe.data.loader import train_loader
from qpipe.errors import ConfigError, DataError
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.settable import SettableGrid
from qpipe.run import Run
from qpipe.stages.calibrate import inference, inputs_of, to_device
from qpipe.stages.prepare import tied_sites

logger = logging.getLogger("qpipe.stages")
Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A linear map or convolution whose weight has a grid of its own.

    Attributes:
        path: of the module.
        module: `nn.Linear` or `nn.Conv2d`.
        quantizer: of its weight.
    """

    path: str
    module: nn.Linear | nn.Conv2d
    quantizer: SettableGrid

    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The layer without bias. Input `[positions, in_features]` or `[images, channels, height, width]`."""
        if isinstance(self.module, nn.Conv2d):
            return self.module._conv_forward(inputs, weight, None)
        return F.linear(inputs, weight)


class _Reached(Exception):
    """The forward pass has come to the layer in question; what follows is not needed."""


def weights_with_grids(run: Run) -> dict[str, SettableGrid]:
    """Every weight whose grid data may choose, by module path."""
    found = run.instruments.quantizers().items()
    return {site.removesuffix(":weight"): q for site, q in found if isinstance(q, SettableGrid)}


def require_examples(run: Run) -> None:
    """Refuse `quantization.ptq` if it is to see more examples than there are.

    Raises:
        DataError: there are fewer.
    """
    options = run.config.quantization.ptq
    if options is not None and len(run.data.train) < options.examples:
        raise DataError(
            f"quantization.ptq.examples {options.examples} exceeds the {len(run.data.train)} training examples; "
            "lower it"
        )


def calibration_data(run: Run) -> list[dict[str, Tensor]]:
    """`quantization.ptq.examples` training examples with labels, in batches: the same on any number of processes.

    The last batch is smaller where the batch size does not divide them.

    Raises:
        DataError: there are fewer examples than are to be used.
    """
    assert run.config.quantization.ptq is not None
    require_examples(run)
    wanted, size = run.config.quantization.ptq.examples, run.config.quantization.ptq.batch_size
    loader = train_loader(
        run.data,
        run.task,
        batch_size=min(size, wanted),
        rank=0,
        world_size=1,
        seed=run.config.seed,
        epoch=0,
        examples=wanted,
    )
    dtype = next(run.student.parameters()).dtype  # before training these are not in the engine's type yet
    return [to_device(batch, run, dtype) for batch in loader]


@contextmanager
def weights_only(run: Run) -> Iterator[None]:
    """Switch the quantizers of activations off: static ones have no range yet, and weights come first."""
    off = QuantContext(enabled=False)
    found = [q for site, q in run.instruments.quantizers().items() if not site.endswith(":weight")]
    try:
        for quantizer in found:
            quantizer.context = off
        yield
    finally:
        for quantizer in found:
            quantizer.context = run.instruments.context


def full_precision_copy(model: nn.Module) -> nn.Module:
    """A copy of the model as it is now, in which no quantizer acts."""
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, Quantizer):
            module.context = QuantContext(enabled=False)
    return twin


def layers_with_grids(run: Run) -> dict[str, Layer]:
    """The layers whose weight has such a grid, by module path.

    Embeddings are left out: each of their weights acts alone, so that rounding to the nearest is best. So are weights
    that several modules share.
    """
    layers = {}
    for path, quantizer in weights_with_grids(run).items():
        module: Any = run.student.get_submodule(path)
        if isinstance(module, nn.Linear | nn.Conv2d) and not tied_sites(run, run.plan.sites[f"{path}:weight"].site):
            layers[path] = Layer(path, module, quantizer)
    return layers


def layers_in_order(run: Run, batches: Batches) -> list[Layer]:
    """The same in the order in which the forward pass reaches them.

    Left out are those that it reaches several times, such as the layers of ALBERT's one block: what fits one of their
    inputs need not fit the others.

    Raises:
        ConfigError: none is left.
    """
    layers = layers_with_grids(run)
    for path in sorted(weights_with_grids(run).keys() - layers.keys()):
        if isinstance(run.student.get_submodule(path), nn.Linear | nn.Conv2d):
            logger.info("%s shares its weight with another module, and keeps its rounding", path)
    calls: Counter[str] = Counter()
    handles = [
        layer.module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
        for path, layer in layers.items()
    ]
    try:
        with inference(run):
            run.student(**inputs_of(batches[0]))
    finally:
        for handle in handles:
            handle.remove()
    for path in (path for path, count in calls.items() if count > 1):
        logger.info("%s runs %d times in a forward pass, and keeps its rounding and its bias", path, calls[path])
    found = [layers[path] for path, count in calls.items() if count == 1]
    if not found:
        raise ConfigError(
            "quantization.ptq: every layer runs several times in a forward pass, so that no rounding or bias can be "
            "fitted to what reaches it; use weights: lapq or none, without bias_correction"
        )
    return found


def inputs_to(model: nn.Module, path: str, batches: Batches) -> Tensor:
    """What reaches a module: `[positions, features]` without padding, or `[images, channels, height, width]`."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].detach())
        raise _Reached

    handle = model.get_submodule(path).register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    model(**inputs_of(batch))
                except _Reached:
                    found[-1] = _positions(model.get_submodule(path), found[-1], batch)
    finally:
        handle.remove()
    return torch.cat(found)


def _positions(module: nn.Module, value: Tensor, batch: dict[str, Tensor]) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return value
    mask = batch.get("attention_mask")
    if mask is not None and value.shape[:2] == mask.shape and value.ndim == 3:
        return value[mask.bool()]
    if mask is not None and value.ndim == 2 and len(value) == mask.numel():  # OPT's, of all tokens one after another
        return value[mask.flatten().bool()]
    return value.reshape(-1, value.shape[-1])
