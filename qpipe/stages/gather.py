"""Gather: whole tensors of a possibly partitioned model, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qpipe.quant.quantizer import Quantizer
from qpipe.run import Run

STORED = "stored_weight"
"""Key, after the site, of a weight in the form that training stores it in."""


def internal_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that qpipe added; what lies below them is not part of the exported model."""
    modules = model.named_modules(remove_duplicate=False)  # modules with tied weights share a quantizer
    added = [n for n, m in modules if isinstance(m, Quantizer) or n.endswith("qpipe_sites")]
    return tuple(f"{name}." for name in added)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model by name, as this process has them, without what qpipe added."""
    prefixes = internal_prefixes(model)
    state = model.state_dict(keep_vars=True)
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and not n.startswith(prefixes)}


def model_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of the student by name, whole, without what qpipe added.

    A collective operation: all processes iterate together. Tensors stay on their device; do not keep references to
    parameters beyond one step of the iteration.
    """
    for name, tensor in own_state(run.student).items():
        if isinstance(tensor, nn.Parameter):
            with run.engine.gathered([tensor]) as (whole,):
                yield name, whole.detach()
        else:
            yield name, tensor.detach()


def share_buffers(run: Run) -> None:
    """Give every process the persistent buffers of process 0, as DDP does. Collective.

    Batch normalization counts on each process what that process saw; only one set of statistics is saved and exported,
    so the same one must be evaluated.
    """
    for buffer in own_state(run.student).values():
        if not isinstance(buffer, nn.Parameter):
            run.engine.broadcast_tensor(buffer)


def ties(model: nn.Module) -> dict[str, str]:
    """Names of tied parameters: every later name of a Parameter -> its first name. Without what qpipe added."""
    first: dict[int, str] = {}
    result = {}
    for name, tensor in own_state(model).items():
        if isinstance(tensor, nn.Parameter):
            owner = first.setdefault(id(tensor), name)
            if owner != name:
                result[name] = owner
    return result


def quantizer_state(run: Run) -> dict[str, Tensor]:
    """Parameters and buffers of every quantizer, as `site/name`, on the CPU of process 0. Collective."""
    state: dict[str, Tensor] = {}
    for site, quantizer in run.instruments.quantizers().items():
        own = quantizer.state_dict(keep_vars=True)
        with run.engine.gathered(own.values()) as whole:
            for name, tensor in zip(own, whole, strict=True):
                if run.engine.rank == 0:
                    state[f"{site}/{name}"] = tensor.detach().to("cpu", copy=True)
    return state


def float_state(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The full-precision student on process 0, as a state dict on the CPU; empty elsewhere. Collective.

    Returns:
        The weights as an ordinary model has them; and by site, as `site/STORED`, those that training stores in another
        form.
    """
    tied = ties(run.student)
    state: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    hosts = {}
    for site, quantizer in run.instruments.quantizers().items():
        name = f"{site.removesuffix(':weight')}.weight"
        hosts[tied.get(name, name)] = site, quantizer  # a rule may name any of the modules that share a weight
    for name, tensor in model_tensors(run):
        if run.engine.rank != 0 and name not in hosts:
            continue
        master = tensor
        if name in hosts:
            site, quantizer = hosts[name]
            with run.engine.gathered(list(quantizer.parameters())), torch.no_grad():
                master = quantizer.master(tensor) if run.engine.rank == 0 else tensor
        if run.engine.rank == 0 and name not in tied:
            state[name] = master.to("cpu", copy=True)
            if master is not tensor:
                stored[f"{site}/{STORED}"] = tensor.to("cpu", copy=True)
    return state, stored
