"""What the processes of test_engines.py run; called by name through `run_distributed`."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from qpipe.builtin.optim import Optim
from qpipe.config import resolve
from qpipe.engine import connect
from qpipe.errors import ConfigError

STEPS = 3
FACTORS = (1.0, 100.0, 1.0)
"""On the loss of each step: without them Adam would hardly tell clipped gradients from others."""


class Net(nn.Module):
    """Two layers of odd sizes with large gradients, and one that adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 3)
        self.idle: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * 4 + 0 * self.unused(x[:, :3]).sum()


def data(step: int) -> torch.Tensor:
    """Eight rows of one micro-batch."""
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(step))


def start(config: dict[str, Any]) -> tuple[Any, nn.Module]:
    """An engine that has taken over the net, an optimizer with decay of weights only, and a falling learning rate."""
    resolved = resolve(config)
    engine = connect(resolved.engine)
    torch.manual_seed(0)
    net = Net()
    if resolved.engine.fsdp:
        net.idle = nn.Linear(3, 3)  # never called, so without gradients, which DDP does not allow
    net = net.to(engine.dtype)
    decays = {"weight": 0.01, "bias": 0.0}
    groups = [
        {"params": [p for n, p in net.named_parameters() if n.endswith(name)], "weight_decay": decay}
        for name, decay in decays.items()
    ]
    optimizer: Any = Optim().qpipe_optimizer(SimpleNamespace(config=resolved), groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine.wrap(net, optimizer, schedule, resolved.train, [net.first])
    return engine, net


def train(config: dict[str, Any], interrupt: Path | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after three steps of two micro-batches, and the norms of all gradients. Collective.

    With `interrupt` a second engine goes on after the second step, from what the first has saved in that folder.
    """
    engine, net = start(config)
    norms, share = [], 8 // engine.world_size
    for step in range(STEPS):
        if interrupt is not None and step == 2:
            engine.save(interrupt)
            engine.barrier()
            engine.close()
            engine, net = start(config)
            engine.load(interrupt)
        for micro in range(2):
            engine.begin_micro_batch(micro == 1)
            rows = data(2 * step + micro)[engine.rank * share : (engine.rank + 1) * share]
            engine.backward(engine.forward(x=rows.to(engine.dtype)).square().mean() * FACTORS[step])
            engine.step()
        norms.append(engine.grad_norm() or 0.0)
    with engine.gathered(net.parameters()) as whole:
        weights = {name: p.detach().clone() for (name, _), p in zip(net.named_parameters(), whole, strict=True)}
    engine.close()
    return weights, norms


def write(cases: dict[str, dict[str, Any]], folder: str) -> None:
    """Train each case, with BertAdam also with an interruption; process 0 writes `CASE.safetensors`."""
    for case, config in cases.items():
        ways = ((case, None), (f"{case}-resumed", Path(folder) / f"{case}-checkpoint"))
        for name, interrupt in ways if config["train"]["optimizer"] == "bert-adam" else ways[:1]:
            if interrupt is not None:
                interrupt.mkdir(exist_ok=True)
            weights, norms = train(config, interrupt)
            if not dist.is_initialized() or dist.get_rank() == 0:
                save_file({**weights, "norms": torch.tensor(norms)}, Path(folder) / f"{name}.safetensors")


def begin_unmoved(config: dict[str, Any]) -> dict[str, float]:
    """What the optimizer of bfloat16 without ZeRO has done before any training."""
    engine, net = start(config)
    wrapped = engine._engine.optimizer
    masters = [p for group in wrapped.fp32_groups for p in group]
    moved = max(float((m - m.bfloat16().float()).abs().max()) for m in masters)
    found = {"states": float(len(wrapped.optimizer.state)), "moved": moved, "rate": wrapped.param_groups[0]["lr"]}
    engine.close()
    return {**found, "masters": float(len(masters)), "parameters": float(len(list(net.parameters())))}


def norms_of_nan(cases: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The norms that each engine gives after a step with finite gradients and one with NaN. Collective."""
    found = {}
    for case, config in cases.items():
        engine, _ = start(config)
        found[case] = []
        for factor in (1.0, float("nan")):
            for micro in range(2):
                engine.begin_micro_batch(micro == 1)
                rows = data(micro)[:4].to(engine.dtype)
                engine.backward(engine.forward(x=rows).square().mean() * factor)
                engine.step()
            norm = engine.grad_norm()
            found[case].append("none" if norm is None else "finite" if math.isfinite(norm) else "not finite")
        engine.close()
    return found


def refused(config: dict[str, Any]) -> str:
    """What the engine says instead of taking the net over."""
    try:
        start(config)
    except ConfigError as error:
        return str(error)
    return "nothing"
