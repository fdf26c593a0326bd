"""What is compared: the same step of the same model, in full precision and in qpipe's own training code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from qpipe.config import RunConfig, resolve
from qpipe.data.loading import TaskData, find_task
from qpipe.engine.base import Processes
from qpipe.host import load_plugins
from qpipe.run import Run, Step
from qpipe.stages.build import instrument
from qpipe.stages.calibrate import calibrate, inputs_of
from qpipe.stages.prepare import prepare
from qpipe.stages.ranges import initialize_ranges
from qpipe.stages.train import collect_losses, micro_step

TOKENS = 128
LEARNING_RATE = 1e-5
BLOCK_WEIGHTS = "{block}.*:weight"
BLOCK_INPUTS = "{block}.*:input"


@dataclass(frozen=True)
class Spec:
    """One side of a comparison.

    Attributes:
        kind: `train`, `train+teacher` (with a forward pass of a second model) or `evaluate`.
        rules: quantization rules; with none and no preset it is the plain full-precision loop, without qpipe code.
        preset: name of a preset, to which `rules` are added.
        plugins: options by plugin name.
        compile: `quantization.compile`.
        micro_batches: parts that the batch is split into, with one optimizer step at the end.
        batch: examples of 128 tokens in an optimizer step.
    """

    kind: str = "train"
    rules: tuple[dict[str, Any], ...] = ()
    preset: str | None = None
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    compile: str = "on"
    micro_batches: int = 1
    batch: int = 8

    @property
    def plain(self) -> bool:
        """True for the loop without qpipe."""
        return not self.rules and not self.plugins and self.preset is None


def make_model(dtype: torch.dtype, layers: int) -> nn.Module:
    """BERT with `layers` blocks of 768 units, 12 heads, intermediate size 3072, 30522 tokens and no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(dtype)  # type: ignore[arg-type]


def make_batches(spec: Spec) -> list[dict[str, Tensor]]:
    """The batch of random tokens, in parts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (spec.batch, TOKENS), generator=generator)
    labels = torch.randint(0, 2, (spec.batch,), generator=generator)
    mask = torch.ones_like(ids)
    parts = zip(*(t.chunk(spec.micro_batches) for t in (ids, mask, labels)), strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in parts]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, the optimizer of both sides."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


class OneProcess(Processes):
    """The engine of the quantized side: exactly what the plain loop does, behind qpipe's protocol."""

    name = "benchmark"
    rank, world_size = 0, 1
    device = torch.device("cpu")
    partitioned = False

    def __init__(self, model: nn.Module, dtype: torch.dtype, accumulation: int) -> None:
        self.dtype, self._model, self._accumulation = dtype, model, accumulation
        self._last = True

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Made at the first step, when the quantizers' parameters are there."""
        return optimizer_of(self._model)

    def begin_micro_batch(self, last: bool) -> None:
        """Note whether the optimizer steps after this one."""
        self._last = last

    def forward(self, **inputs: Tensor) -> Any:
        """Call the model."""
        return self._model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Update after the last micro-batch."""
        if self._last:
            self._optimizer.step()
            self._optimizer.zero_grad()


def plain_side(spec: Spec, dtype: torch.dtype, layers: int) -> Callable[[], None]:
    """The full-precision step, in PyTorch alone."""
    model, batches = make_model(dtype, layers), make_batches(spec)
    inputs = [inputs_of(batch) for batch in batches]
    if spec.kind == "evaluate":
        return lambda: _forward_only(model.eval(), inputs[0])
    teacher = make_model(dtype, layers).eval() if spec.kind == "train+teacher" else None
    optimizer = optimizer_of(model.train())

    def step() -> None:
        for batch, arguments in zip(batches, inputs, strict=True):
            if teacher is not None:
                _forward_only(teacher, arguments)
            loss = F.cross_entropy(model(**arguments).logits.float(), batch["labels"])
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _forward_only(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def quantized_run(spec: Spec, dtype: torch.dtype, layers: int, out: Path) -> Run:
    """A prepared run around the benchmark's model: plan, quantizers, penalties and taps as `qpipe train` makes them."""
    config: RunConfig = resolve(
        {
            "model": {"name": "benchmark"},
            "task": "sst2",
            "quantization": {
                "preset": spec.preset,
                "rules": list(spec.rules),
                "compile": spec.compile,
                "calibration_batches": 1,
                "calibration_batch_size": spec.batch,
            },
            "train": {"accumulation": spec.micro_batches, "batch_size": spec.batch},
            "plugins": spec.plugins,
            "export": {"format": "native"},
            "out": str(out),
        }
    )
    host = load_plugins(config.plugins)
    model = make_model(dtype, layers)
    engine = OneProcess(model, dtype, spec.micro_batches)
    task = find_task(host.collect("qpipe_tasks"), config.task)
    # All that these stages ask of an engine is there.
    run = Run(config, host, engine, task, synthetic_data(spec), model)  # type: ignore[arg-type]
    run.instruments = instrument(host, model)
    run.total_steps = 1000
    if spec.kind == "train+teacher":
        run.teacher = make_model(dtype, layers).eval().requires_grad_(False)
    prepare(run)
    initialize_ranges(run)
    calibrate(run)
    return run


def synthetic_data(spec: Spec) -> TaskData:
    """The examples of the benchmark's batch, for calibration."""
    rows: dict[str, list[Any]] = {}
    for batch in make_batches(spec):
        for name, value in batch.items():
            rows.setdefault(name, []).extend(value.tolist())
    data = Dataset.from_dict(rows)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in rows}

    return TaskData(data, data, collate, None, 2, ())


def quantized_side(spec: Spec, dtype: torch.dtype, layers: int, out: Path) -> Callable[[], None]:
    """The same step by qpipe's own code: `micro_step`, one optimizer step, quantized weights forgotten once."""
    run = quantized_run(spec, dtype, layers, out)
    batches = make_batches(spec)
    if spec.kind == "evaluate":
        return lambda: _forward_only(run.student.eval(), inputs_of(batches[0]))
    losses = collect_losses(run)
    run.student.train()

    def step() -> None:
        for number, batch in enumerate(batches):
            micro_step(run, Step(0, number == len(batches) - 1, batch), losses)
            run.engine.step()
        run.instruments.context.weights_changed()
        run.step = None

    return step


def make_side(spec: Spec, dtype: torch.dtype, layers: int, out: Path) -> Callable[[], None]:
    """A function that does one step of one side."""
    return plain_side(spec, dtype, layers) if spec.plain else quantized_side(spec, dtype, layers, out)


def missing_plugins(specs: Iterable[Spec]) -> set[str]:
    """Plugins that a comparison needs and that are not installed."""
    from qpipe.host import installed

    return {name for spec in specs for name in spec.plugins} - set(installed())
