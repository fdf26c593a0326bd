"""Train: the loop, from the first or a restored step to the last."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from qpipe.errors import ConfigError, TrainingError, suggest
from qpipe.host import BUILTIN_PREFIX
from qpipe.quant.moments import from_sums
from qpipe.run import Run, Step
from qpipe.stages import checkpoint
from qpipe.stages.build import seed_everything
from qpipe.stages.calibrate import inputs_of, micro_batches, to_device
from qpipe.stages.diagnose import first_non_finite
from qpipe.stages.evaluate import evaluate, is_better
from qpipe.stages.phases import enter_phase
from qpipe.stages.self_check import self_check
from qpipe.stages.teaching import extra_inputs, teacher_signals, wanted_signals
from qpipe.types import Loss

logger = logging.getLogger("qpipe.stages")


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        step: optimizer steps taken.
        best_step: step of the best evaluation, None before the first.
        best_metric: its first metric.
    """

    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None


@dataclass
class Meter:
    """Sums of what is logged, over the micro-batches of one step."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parts: dict[str, Tensor], scale: float) -> None:
        """Add detached parts."""
        for name, value in parts.items():
            value = value.detach().float() * scale
            self.parts[name] = self.parts[name] + value if name in self.parts else value


def steps_per_epoch(run: Run) -> int:
    """Optimizer steps in one pass over the training data; the incomplete last batch is dropped.

    Raises:
        ConfigError: the data do not fill a single batch.
    """
    count = len(run.data.train) // run.config.train.batch_size
    if count == 0:
        raise ConfigError(
            f"train.batch_size {run.config.train.batch_size} exceeds the {len(run.data.train)} training examples; "
            "lower it, or give more data"
        )
    return count


def total_steps(run: Run) -> int:
    """Optimizer steps of the whole training: `train.max_steps`, else what the data say, else `train.epochs`.

    Raises:
        ConfigError: the data do not fill a single batch.
    """
    train, per_epoch = run.config.train, steps_per_epoch(run)
    wanted = round(train.epochs * per_epoch, 6)  # 1.1 * 100 is 110.00000000000001
    return train.max_steps or run.data.steps or max(1, math.ceil(wanted))


def collect_losses(run: Run) -> list[Loss]:
    """The loss terms, without those that another term replaces.

    Raises:
        ConfigError: a term replaces one that does not exist, or none is left.
    """
    losses: dict[str, Loss] = run.host.collect("qpipe_losses", run=run)
    replaced = {name: loss.name for loss in losses.values() for name in loss.replaces}
    for name, by in replaced.items():
        if name not in losses:
            raise ConfigError(f"loss {by!r} replaces {name!r}, which no plugin offers{suggest(name, losses)}")
    kept = [loss for loss in losses.values() if loss.name not in replaced]
    if not kept:
        raise ConfigError("no loss is left to train with; let one plugin keep the task loss")
    return kept


def task_loss(run: Run) -> Loss:
    """The task's own loss: what plugins add to it or put in its place needs training around it."""
    own = (call for plugin, call in run.host.implementations("qpipe_losses") if plugin.startswith(BUILTIN_PREFIX))
    return next(loss for call in own for loss in call(run=run) if loss.name == "task")


def steps_from(run: Run, start: int) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
    """`(optimizer step, its micro-batches)` from step `start` on. The position follows from the step alone."""
    train = run.config.train
    per_epoch = steps_per_epoch(run)
    step = start
    while step < run.total_steps:
        epoch, within = divmod(step, per_epoch)
        loader = iter(micro_batches(run, epoch, skip=within * train.accumulation))
        for _ in range(within, per_epoch):
            if step >= run.total_steps:
                return
            yield step, list(islice(loader, train.accumulation))
            step += 1


def micro_step(run: Run, step: Step, losses: list[Loss]) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; returns the weighted loss parts.

    Raises:
        TrainingError: the loss is not finite; names the first module whose output is not.
    """
    context = run.instruments.context
    run.step = step
    run.engine.begin_micro_batch(step.is_last_micro_batch)
    run.host.hook.qpipe_step_start(run=run, step=step)
    wanted = step.signals = wanted_signals(run)
    teacher_signals(run, step, wanted)
    run.instruments.want(wanted.student, step.student)
    context.weight_losses.clear()
    context.micro_batch = step.index * run.config.train.accumulation + step.number
    context.due_weight_losses = due_weight_losses(run, step)
    context.taps_active = True
    step.output = run.engine.forward(**inputs_of(step.batch), **extra_inputs(wanted.student))
    run.instruments.take_outputs(step.output, wanted.student, step.student)
    parts = {loss.name: _part(loss, step) for loss in losses}
    parts |= weight_loss_parts(run)
    total = torch.stack([part.float() for part in parts.values()]).sum()
    if run.engine.any(~torch.isfinite(total.detach())):  # so that all processes stop together
        context.taps_active = False
        raise TrainingError(non_finite_message(run, step, parts))
    run.engine.backward(total)
    context.taps_active = False
    return parts


def _part(loss: Loss, step: Step) -> Tensor:
    try:
        return _weight(loss, step.index) * loss.fn(step)
    except Exception as error:
        error.add_note(f"raised by loss {loss.name!r}")
        raise


def _weight(loss: Loss, index: int) -> float:
    return loss.weight(index) if callable(loss.weight) else loss.weight


def due_weight_losses(run: Run, step: Step) -> frozenset[str]:
    """Names of the penalties that act in this micro-batch: the last of every `every`-th optimizer step."""
    if not step.is_last_micro_batch:
        return frozenset()
    return frozenset(term.name for term in run.weight_losses if (step.index + 1) % term.every == 0)


def weight_loss_parts(run: Run) -> dict[str, Tensor]:
    """Weighted penalties met in this forward pass, by name.

    They act in the last micro-batch only; the factor `accumulation` undoes the engine's division. Those that are not
    due in every step count for the steps left out.
    """
    found = run.instruments.context.weight_losses
    if not found:
        return {}
    parts = {}
    for term in run.weight_losses:
        if term.name not in run.instruments.context.due_weight_losses:
            continue
        own = [value for (name, _), value in found.items() if name == term.name]
        values = term.fn(from_sums(own)) if term.moments else torch.stack(own)
        combined = values.mean() if term.reduction == "mean" else values.sum()
        parts[term.name] = term.weight * term.every * run.config.train.accumulation * combined
    return parts


def non_finite_message(run: Run, step: Step, parts: dict[str, Tensor]) -> str:
    """Say on which process which part and which module went wrong first. Collective."""
    bad = [name for name, value in parts.items() if not bool(torch.isfinite(value.detach()))]
    total = torch.stack([part.detach().float() for part in parts.values()]).sum()
    found = run.engine.gather_objects((bool(torch.isfinite(total)), bad, first_non_finite(run, step)))
    rank, (_, bad, module) = next((i, entry) for i, entry in enumerate(found) if not entry[0])
    where = f"the first module whose output is not finite is {module}" if module else "every module's output is finite"
    return (
        f"the loss is not finite at step {step.index} (rank {rank}; parts: {', '.join(bad) or 'their sum'}); {where}; "
        f"{_kept(run)}. Lower train.learning_rate, or check the data of this batch"
    )


def require_finite_gradients(run: Run, index: int) -> None:
    """Stop before weights that such a gradient has reached are saved; DeepSpeed may have skipped the step instead.

    Raises:
        TrainingError: the norm of the gradients of this step, the same on all processes, is infinite or NaN.
    """
    norm = run.engine.grad_norm()
    if norm is None or math.isfinite(norm):
        return
    raise TrainingError(
        f"the gradient is not finite at step {index}, though the loss is; {_kept(run)}. Lower train.learning_rate, or "
        "check the data of this batch"
    )


def _kept(run: Run) -> str:
    last = checkpoint.steps(run.out)
    return f"the checkpoint of step {last[-1]} is kept" if last else "no checkpoint had been written"


def train(run: Run, resume: bool = False) -> Progress:
    """Train from the beginning, or from the newest checkpoint.

    Raises:
        TrainingError: the loss or a gradient became non-finite.
        CheckpointError: a checkpoint cannot be written or read.
    """
    losses = collect_losses(run)
    progress, begun = Progress(), time.perf_counter()
    seconds: dict[str, float] = run.results.setdefault("seconds", {})
    seed_everything(run.config.seed, run.engine.rank)
    found = checkpoint.steps(run.out)
    if resume and found:
        restored = checkpoint.load(run, found[-1])
        progress = Progress(restored["step"], restored["best_step"], restored["best_metric"])
        run.results |= {"resumed_step": progress.step, **restored.get("results", {})}
        for name, value in restored.get("seconds", {}).items():  # of earlier sessions, as far as they were saved
            seconds[name] = round(seconds.get(name, 0.0) + value, 2)
        state = checkpoint.random_state(run.engine.device)
        self_check(run)
        checkpoint.restore_random_state(state, run.engine.device)
    run.host.hook.qpipe_run_start(run=run)
    run.student.train()
    started = time.perf_counter()
    for index, batches in steps_from(run, progress.step):
        enter_phase(run, index)
        logged = (index + 1) % run.config.train.log_every == 0 or index + 1 == run.total_steps
        meter = Meter()
        for number, batch in enumerate(batches):
            step = Step(index, number == len(batches) - 1, to_device(batch, run), number=number)
            parts = micro_step(run, step, losses)
            if logged:
                meter.add(parts, 1 / len(batches))
            run.engine.step()
        require_finite_gradients(run, index)
        run.instruments.context.weights_changed()
        metrics = step_metrics(run, meter, started) if logged else {}
        run.host.hook.qpipe_step_end(run=run, step=step, metrics=metrics)
        run.step = None
        progress.step = index + 1
        after_step(run, progress, step, time.perf_counter() - begun)
        started = time.perf_counter()  # loading the next batches counts
    finish(run, progress)
    return progress


def step_metrics(run: Run, meter: Meter, started: float) -> dict[str, float]:
    """What is logged of a step, averaged over processes."""
    values = {name: float(value) for name, value in meter.parts.items()}
    reduced = run.engine.reduce(values)
    metrics = {"loss": sum(reduced.values()), **reduced}
    norm = run.engine.grad_norm()
    if norm is not None:
        metrics["grad_norm"] = norm
    metrics["lr"] = float(run.scheduler.get_last_lr()[0])
    metrics["samples_per_second"] = run.config.train.batch_size / (time.perf_counter() - started)
    return metrics


def after_step(run: Run, progress: Progress, last: Step, elapsed: float) -> None:
    """Evaluate and save where it is due, and where a phase ends.

    Args:
        run: in training.
        progress: after the step.
        last: micro-batch of the step.
        elapsed: seconds since training began or was resumed.
    """
    train_config = run.config.train
    per_epoch = steps_per_epoch(run)
    ends = progress.step in {phase.stop for phase in run.phases}
    due_eval = progress.step % (train_config.eval_every or per_epoch) == 0 or ends
    due_save = progress.step % (train_config.save_every or per_epoch) == 0 or ends
    if due_eval:
        intervening = bool(last.signals.evaluation)
        metrics = evaluate(run, last)
        run.host.hook.qpipe_evaluated(run=run, metrics=metrics)
        run.results.pop("evaluation", None)
        if not intervening:
            run.results["evaluation"] = metrics
        counts = not intervening and progress.step > run.phases[-1].start
        if counts and is_better(run, metrics, progress.best_metric):
            progress.best_step, progress.best_metric = progress.step, metrics[run.task.metrics[0].name]
            due_save = True
    if due_save:
        before: dict[str, float] = run.results.get("seconds", {})
        seconds = {**before, "train": round(before.get("train", 0.0) + elapsed, 2)}
        checkpoint.save(run, {**vars(progress), "seconds": seconds})
    if run.teacher_cache is not None and (due_save or progress.step % per_epoch == 0):
        run.teacher_cache.flush()


def finish(run: Run, progress: Progress) -> None:
    """End with the best weights, if so configured, and evaluate what will be exported."""
    best = progress.best_step
    if run.config.train.keep_best and best is not None and best != progress.step:
        there = checkpoint.folder(run.out, best).is_dir()
        if run.engine.broadcast_object(there):
            checkpoint.load(run, best)
            run.results.pop("evaluation", None)
        else:  # removed because it was damaged, as the message about that says
            logger.warning("the checkpoint of step %d, the best, is gone: the run ends with its last weights", best)
            best = None
    if "evaluation" not in run.results:  # other weights, or resumed where nothing was left to train
        run.results["evaluation"] = evaluate(run)
    run.results["steps"] = progress.step
    run.results["best_step"] = best
    run.host.hook.qpipe_run_end(run=run)
