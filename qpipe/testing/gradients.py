"""Gradients and codes of a few steps under any engine, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from qpipe.config import RunConfig, resolve
from qpipe.engine.sharding import whole_tensor
from qpipe.host import load_plugins
from qpipe.run import Run, Step
from qpipe.stages.calibrate import calibrate, to_device
from qpipe.stages.execute import assemble
from qpipe.stages.export import packed_weights
from qpipe.stages.gather import quantizer_state
from qpipe.stages.phases import enter_phase
from qpipe.stages.self_check import self_check
from qpipe.stages.train import collect_losses, micro_step, steps_from


def full_gradients(run: Run) -> dict[str, Tensor]:
    """Whole float32 gradients by parameter name, after backward and before the update. Collective."""
    if run.engine.name == "deepspeed":
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in run.student.named_parameters()}
    else:
        grads = {name: p.grad for name, p in run.student.named_parameters()}
        found = {name: g if g is None else whole_tensor(g) for name, g in grads.items()}
    return {name: g.detach().float().cpu().clone() for name, g in found.items() if g is not None}


def trace(config: RunConfig, steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train `steps` optimizer steps; gradients of each, and codes and ranges at the end (on rank 0).

    Collective.
    """
    host = load_plugins(config.plugins)
    run = assemble(config, host, {})
    calibrate(run)
    self_check(run)
    losses = collect_losses(run)
    run.out.mkdir(parents=True, exist_ok=True)
    run.host.hook.qpipe_run_start(run=run)
    run.student.train()
    gradients = []
    for index, micro_batches in steps_from(run, 0):
        if index == steps:
            break
        enter_phase(run, index)
        for number, batch in enumerate(micro_batches):
            step = Step(index, number == len(micro_batches) - 1, to_device(batch, run), number=number)
            micro_step(run, step, losses)
            if step.is_last_micro_batch:
                gradients.append(full_gradients(run))
            run.engine.step()
        run.instruments.context.weights_changed()
    if run.teacher_cache is not None:
        run.teacher_cache.flush()
    packed, _ = packed_weights(run)
    codes = {f"codes/{name}": weight.tensor.integers() for name, weight in packed.items()}
    learned = {f"{s}/{n}" for s, q in run.instruments.quantizers().items() for n, _ in q.named_parameters()}
    for name, value in quantizer_state(run).items():
        if ":weight/" not in name:
            codes[f"{'learned' if name in learned else 'ranges'}/{name}"] = value
    run.engine.close()
    return gradients, codes


def write_traces(cases: dict[str, dict[str, Any]], steps: int, folder: str) -> list[str]:
    """`trace` several configurations one after another and write `CASE.safetensors`; for `run_distributed`."""
    for name, source in cases.items():
        gradients, codes = trace(resolve(source), steps)
        if not dist.is_initialized() or dist.get_rank() == 0:
            tensors = {f"gradient/{i}/{key}": g for i, step in enumerate(gradients) for key, g in step.items()}
            tensors |= codes
            save_file({k: v.contiguous() for k, v in tensors.items()}, Path(folder) / f"{name}.safetensors")
    return list(cases)


def compare(
    expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float = 1e-4, after_update: float | None = None
) -> None:
    """Compare two traces: gradients within a part of their largest element, codes within one in a thousand.

    Calibrated ranges have to be equal; so have learned ones where the weights are.

    Gradients of equal weights differ by float rounding only, so let both sides train with a learning rate next to
    nothing. A weight on the border between two codes may fall on either side.

    Args:
        expected: one trace.
        found: the other.
        tolerance: of the gradients.
        after_update: of those after the first step, and of learned ranges, where the weights really change; default:
            `tolerance`, and equal ranges.

    Raises:
        AssertionError: they differ; says where and by how much.
    """
    moved, after_update = after_update or 0.0, tolerance if after_update is None else after_update
    for key in sorted(set(expected) ^ set(found)):
        alone = expected[key] if key in expected else found[key]
        assert not bool(alone.any()), f"only one side has {key}"
    for key in sorted(set(expected) & set(found)):
        if key.startswith("codes/"):
            difference = (expected[key].int() - found[key].int()).abs()
            share = float((difference > 0).float().mean())
            assert int(difference.max()) <= 1 and share <= 1e-3, f"{key}: {share:.2%} of the codes differ"
            continue
        if key.startswith("ranges/"):
            assert torch.equal(expected[key], found[key]), f"{key}: {found[key]} was calibrated, not {expected[key]}"
            continue
        if key.startswith("learned/"):
            difference = (expected[key] - found[key]).abs()
            close = bool((difference <= moved * expected[key].abs()).all())
            assert close, f"{key}: {found[key]} was learned, not {expected[key]}"
            continue
        allowed = tolerance if key.startswith("gradient/0/") else after_update
        largest = max(float(expected[key].abs().max()), 1e-6)
        error = float((expected[key] - found[key]).abs().max())
        assert error <= allowed * largest + 1e-7, f"{key}: gradients differ by {error:.2e} of {largest:.2e}"
