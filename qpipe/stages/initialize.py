"""Initialise: weights are quantized with the help of training data, before any training.

Runs while every process holds whole weights, before the engine may shard them; all processes do the same work, and take
over what process 0 has found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.config import PtqConfig
from qpipe.errors import ConfigError
from qpipe.quant.adaround import Rounding, learn_rounding
from qpipe.quant.lapq import lapq
from qpipe.quant.settable import SettableGrid
from qpipe.run import Run, Step
from qpipe.stages.calibrate import inference, inputs_of, require_batch
from qpipe.stages.layers import (
    Batches,
    Layer,
    calibration_data,
    full_precision_copy,
    inputs_to,
    layers_in_order,
    layers_with_grids,
    require_examples,
    weights_only,
    weights_with_grids,
)
from qpipe.stages.train import steps_per_epoch, task_loss

logger = logging.getLogger("qpipe.stages")


def needs_data(options: PtqConfig | None) -> bool:
    """True if weights are to be initialised with the help of data."""
    return options is not None and (options.weights != "none" or options.bias_correction)


def require_targets(run: Run) -> None:
    """Refuse a plan that leaves these methods nothing to do.

    Raises:
        ConfigError: no weight has a grid that data may choose, or one has levels that learned rounding cannot keep.
    """
    options = run.config.quantization.ptq
    if options is None or not needs_data(options):
        return
    found: Mapping[str, SettableGrid] = weights_with_grids(run)
    method, what = f"weights: {options.weights}", "weights"
    if options.weights != "lapq" or options.bias_correction:
        found = {path: layer.quantizer for path, layer in layers_with_grids(run).items()}
        method = method if options.weights == "adaround" else "bias_correction"
        what = "weights of linear maps and convolutions that no other module shares,"
    if not found:
        kinds = run.host.collect("qpipe_quantizers").items()
        names = [name for name, kind in kinds if isinstance(kind.build, type) and issubclass(kind.build, SettableGrid)]
        raise ConfigError(
            f"quantization.ptq.{method} works on {what} with one of {', '.join(['uniform', *sorted(names)])}, and the "
            "plan has none; give quantization.preset, or rules with one of them"
        )
    shifted = next((path for path, quantizer in found.items() if quantizer.moves_levels), None)
    if options.weights == "adaround" and shifted is not None:
        raise ConfigError(f"quantization.ptq.weights: adaround does not go with keep_mean, which {shifted} has")


def require_data(run: Run, decided: bool = True) -> None:
    """What can be told of post-training methods and calibration before any of them begins.

    Args:
        run: prepared.
        decided: whether its training data are those that it will have.

    Raises:
        ConfigError: see `require_targets`.
        DataError: there are fewer examples than they are to see.
    """
    require_targets(run)
    if decided:
        steps_per_epoch(run)  # the self-check takes a batch of training
        require_batch(run)
        if needs_data(run.config.quantization.ptq):
            require_examples(run)


def initialize(run: Run) -> None:
    """LAPQ or AdaRound, then bias correction, as `quantization.ptq` says. Collective.

    Args:
        run: prepared; the engine has not wrapped the student yet.

    Raises:
        ConfigError: the plan has no weight for them.
        DataError: there are too few training examples.
    """
    options = run.config.quantization.ptq
    require_targets(run)
    if options is None or not needs_data(options):
        return
    run.student.to(run.engine.device)
    batches = calibration_data(run)
    report: dict[str, Any] = {"examples": sum(len(next(iter(batch.values()))) for batch in batches)}
    with weights_only(run), inference(run):
        # Biases are corrected towards what the model computed before any of it changed.
        reference = full_precision_copy(run.student)
        if options.weights == "lapq":
            report["lapq"] = search_clips(run, batches, options)
        if options.weights == "adaround" or options.bias_correction:
            report["layers"] = layer_by_layer(run, reference, batches, options)
    share(run)
    run.instruments.context.weights_changed()
    run.results["ptq"] = report


def share(run: Run) -> None:
    """Every process takes over weights, biases and grids of process 0."""
    for quantizer in weights_with_grids(run).values():
        for buffer in quantizer.buffers():
            run.engine.broadcast_tensor(buffer)
    for parameter in run.student.parameters():
        run.engine.broadcast_tensor(parameter.data)


# --- LAPQ -------------------------------------------------------------------------------------------------------------


class WeightClip:
    """The clip of a weight on a grid: one factor on all its scales."""

    def __init__(self, weight: Tensor, quantizer: SettableGrid) -> None:
        self._weight, self._quantizer = weight.detach(), quantizer

    def start(self, p: float) -> None:
        """The clip of least `mean |error|^p`, for each scale by itself."""
        self._scale, self._zero = self._quantizer.search(self._weight, method="lp", p=p)
        self._quantizer.set_grid(self._scale, self._zero, self._weight)

    def scale(self, factor: float) -> None:
        """Multiply every scale of the start."""
        self._quantizer.set_grid(self._quantizer.snap(self._scale * factor), self._zero, self._weight)


def search_clips(run: Run, batches: Batches, options: PtqConfig) -> dict[str, Any]:
    """Set the clips of all weights with grids by LAPQ; returns how it went."""
    term = task_loss(run)
    sizes = torch.tensor([float(len(next(iter(batch.values())))) for batch in batches])
    shares = (sizes / sizes.mean()).to(run.engine.device)  # a last batch may be smaller

    def loss() -> float:
        parts = []
        for batch in batches:
            output = run.student(**inputs_of(batch))
            parts.append(term.fn(Step(0, True, batch, output)).float())
        return float((torch.stack(parts) * shares).mean())

    clips = [
        WeightClip(run.student.get_parameter(f"{path}.weight"), quantizer)
        for path, quantizer in weights_with_grids(run).items()
    ]
    result = lapq(clips, loss, options.evaluations)
    logger.info(
        "lapq: loss %.4f at p = %.2f, %.4f after %d evaluations",
        result.start_loss,
        result.p,
        result.loss,
        result.evaluations,
    )
    return vars(result).copy()


# --- layer by layer ---------------------------------------------------------------------------------------------------


def layer_by_layer(run: Run, reference: nn.Module, batches: Batches, options: PtqConfig) -> dict[str, Any]:
    """Round and correct each layer in turn, so that it makes up for what the layers before it have lost.

    Its input is that of the quantized network so far, its target the full-precision output of the full-precision input
    (asymmetric reconstruction). Returns the mean squared error of each layer's output, before and after.
    """
    generator = torch.Generator().manual_seed(run.config.seed)
    report: dict[str, Any] = {}
    layers = layers_in_order(run, batches)
    without_bias = [layer.path for layer in layers if layer.module.bias is None]
    if options.bias_correction and without_bias:
        logger.info("%d layers have no bias to correct, such as %s", len(without_bias), without_bias[0])
    for number, layer in enumerate(layers, 1):
        inputs = inputs_to(run.student, layer.path, batches)
        original: Any = reference.get_submodule(layer.path)
        target = layer.output(inputs_to(reference, layer.path, batches), original.weight)
        before = _error(layer, inputs, target)
        if options.weights == "adaround":
            round_layer(layer, inputs, target, options, generator)
        if options.bias_correction and layer.module.bias is not None:
            correct_bias(layer, inputs, target)
        report[layer.path] = {"before": before, "after": _error(layer, inputs, target, bias=original.bias)}
        logger.info(
            "layer %d/%d %s: output error %.4g -> %.4g", number, len(layers), layer.path, *report[layer.path].values()
        )
    return report


def _error(layer: Layer, inputs: Tensor, target: Tensor, bias: Tensor | None = None) -> float:
    """Mean squared error of the output, with the bias's change against `bias` counted."""
    difference = layer.output(inputs, layer.quantizer(layer.module.weight)) - target
    if bias is not None and layer.module.bias is not None:
        difference += _per_feature(layer.module.bias - bias, difference)
    return float(difference.square().mean())


def _per_feature(value: Tensor, output: Tensor) -> Tensor:
    return value.reshape(1, -1, *(1,) * (output.ndim - 2))


def correct_bias(layer: Layer, inputs: Tensor, target: Tensor) -> None:
    """Add to the bias what quantization takes from the mean of each output feature.

    With inputs of the full-precision network this is `E[x] (W - W_q)`: Nagel et al., "Data-Free Quantization Through
    Weight Equalization and Bias Correction" (2019), section 4.2, with means from data.
    """
    assert layer.module.bias is not None
    lost = target - layer.output(inputs, layer.quantizer(layer.module.weight))
    layer.module.bias.add_(lost.mean([axis for axis in range(lost.ndim) if axis != 1]))


def round_layer(layer: Layer, inputs: Tensor, target: Tensor, options: PtqConfig, generator: torch.Generator) -> None:
    """Learn the rounding of a layer's weight, and store the rounded weight, which its grid holds exactly."""
    quantizer, weight = layer.quantizer, layer.module.weight
    rows = quantizer.rows_of(weight.detach())
    with torch.enable_grad():
        rounding = Rounding(rows, *quantizer.grid_in_use(), quantizer.low, quantizer.high, options.relaxation)
        learn_rounding(
            rounding,
            lambda x, w: layer.output(x, w.view(weight.shape)),
            random_batches(inputs, target, options, generator),
            options.iterations,
            options.learning_rate,
            decay=options.decay,
            decay_shape=options.decay_shape,
        )
    weight.copy_(rounding.hard().view(weight.shape))
    quantizer.changed()


def random_batches(
    inputs: Tensor, target: Tensor, options: PtqConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """As many random positions as `batch_size` examples have on average, again and again."""
    size = max(1, len(inputs) * options.batch_size // max(options.batch_size, options.examples))
    while True:
        chosen = torch.randperm(len(inputs), generator=generator)[:size].to(inputs.device)
        yield inputs[chosen], target[chosen]
