"""Sensitivity: what quantizing one weight alone costs, at several widths.

The loss on a fixed sample of training data is measured with one weight quantized and everything else in full precision.
ZeroQ (Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, sections on sensitivity and the Pareto
frontier) measures every layer at every width like this, with the divergence of the output in place of the loss, and
assumes that the costs of several layers add up. `together` measures how far they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qpipe.config import RunConfig
from qpipe.engine.accelerate import AccelerateEngine
from qpipe.engine.base import resolve_precision
from qpipe.host import load_plugins
from qpipe.run import Run, Step
from qpipe.stages.build import build
from qpipe.stages.calibrate import calibration_batches, inference, inputs_of
from qpipe.stages.casting import cast
from qpipe.stages.prepare import prepare
from qpipe.stages.train import task_loss
from qpipe.stages.trained import alone, restore
from qpipe.stages.variants import rebuilt, require_master_copies, rule_with_bits, switched_off
from qpipe.types import Json, Loss


@dataclass(frozen=True)
class Choice:
    """One weight at one width.

    Attributes:
        site: its name.
        bits: width of a code.
        increase: loss with this weight quantized less that of the full-precision model; can be negative.
        stored: bytes in the exported file, with scales; of all copies where the weight is tied and stored twice.
    """

    site: str
    bits: int
    increase: float
    stored: int


@dataclass(frozen=True)
class Sensitivity:
    """Result of `measure`.

    Attributes:
        loss: mean loss of the full-precision model.
        examples: how many training examples it is the mean over.
        choices: by site, in model order, one choice per width.
    """

    loss: float
    examples: int
    choices: Mapping[str, tuple[Choice, ...]]


def load(source: Path | RunConfig) -> Run:
    """A finished run with its trained weights, or a configured model with the weights it is loaded with.

    Raises:
        QpipeError: something named in the configuration cannot be loaded, or the run has not ended.
        ConfigError: the run has no full-precision copy of a weight; see `require_master_copies`.
    """
    if isinstance(source, Path):
        run = restore(source)
        require_master_copies(run, run.plan.sites)
        return run
    config = alone(source)
    engine = AccelerateEngine(config.engine)
    if source.engine.name == "deepspeed":
        engine.dtype = resolve_precision(source.engine, engine.device)  # what the run would train and export in
    run = build(config, load_plugins(config.plugins), engine)
    prepare(run)
    cast(run.student, run)
    engine.serve(run.student)
    return run


def sample(run: Run, examples: int) -> list[dict[str, Tensor]]:
    """Batches of the first `examples` rows of a fixed shuffle of the training data; fewer if there are fewer."""
    size = run.config.train.micro_batch_size(run.engine.world_size)
    batches = list(calibration_batches(run, math.ceil(examples / size)))
    excess = size * len(batches) - examples
    if excess > 0:
        batches[-1] = {name: value[: size - excess] for name, value in batches[-1].items()}
    return batches


def mean_loss(run: Run, batches: Sequence[dict[str, Tensor]], loss: Loss) -> float:
    """The loss of the model as its quantizers are now, mean over the examples of the batches."""
    total, count = 0.0, 0
    with inference(run):
        for batch in batches:
            output = run.engine.forward(**inputs_of(batch))
            number = len(next(iter(batch.values())))
            total += number * float(loss.fn(Step(0, False, batch, output)))
            count += number
    return total / count


@contextmanager
def only(run: Run, bits: Mapping[str, int]) -> Iterator[None]:
    """Within, exactly these sites are quantized, each to its width."""
    with switched_off(run, run.plan.sites), ExitStack() as stack:
        for name, width in bits.items():
            stack.enter_context(rebuilt(run, [name], width))
        yield


def measure(
    run: Run,
    sizes: Mapping[str, Mapping[int, int]],
    examples: int = 512,
    told: Callable[[Choice], None] = lambda choice: None,
) -> Sensitivity:
    """Loss increase of each weight at every width.

    Args:
        run: as `load` gives it.
        sizes: which weights at which widths, with their sizes, as `stored_sizes` gives them.
        examples: training examples to measure on.
        told: called with every result.
    """
    batches, loss = sample(run, examples), task_loss(run)
    with only(run, {}):
        before = mean_loss(run, batches, loss)
    found: dict[str, tuple[Choice, ...]] = {}
    for name, widths in sizes.items():
        for width, stored in widths.items():
            with only(run, {name: width}):
                choice = Choice(name, width, mean_loss(run, batches, loss) - before, stored)
            found[name] = (*found.get(name, ()), choice)
            told(choice)
    return Sensitivity(before, sum(len(next(iter(b.values()))) for b in batches), found)


def together(run: Run, chosen: Sequence[Choice], examples: int) -> float:
    """Loss increase with all chosen weights quantized at once: the sum of their own increases, if costs add up."""
    batches, loss = sample(run, examples), task_loss(run)
    with only(run, {}):
        before = mean_loss(run, batches, loss)
    with only(run, {choice.site: choice.bits for choice in chosen}):
        return mean_loss(run, batches, loss) - before


def rules(run: Run, chosen: Sequence[Choice]) -> list[dict[str, Json]]:
    """The choices as `quantization.rules`: the planned quantizer of each site with all its options."""
    return [rule_with_bits(run.plan.sites[choice.site], choice.bits) for choice in chosen]
