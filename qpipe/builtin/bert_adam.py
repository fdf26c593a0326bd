"""The optimizer that BERT was trained with, and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.optim import Optimizer


class BertAdam(Optimizer):
    """Adam without bias correction; weight decay is added to the update and so scaled by the learning rate.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  p -= lr (m / (sqrt(v) + eps) + decay p)

    As in the code published with BERT (Devlin et al., 2019; `AdamWeightDecayOptimizer`) and, named BertAdam, with
    TinyBERT. First steps are about `(1 - b1) / sqrt(1 - b2)` = 3 times as long as Adam's. That code
    clips gradients tensor by tensor in the optimizer; here the engine does, since an optimizer may hold mere parts of
    tensors. A parameter without a gradient is left alone, decay included.

    Args:
        params: parameters, or groups.
        lr: learning rate, 0 or above.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: 0 or above.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"BertAdam takes lr >= 0, betas in [0, 1), eps > 0 and weight_decay >= 0, not lr={lr}, betas={betas}, "
                f"eps={eps}, weight_decay={weight_decay}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        gradient, first, second = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        assert gradient is not None
        beta1, beta2 = group["betas"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = first / second.sqrt().add_(group["eps"])
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def warmup_linear(step: int, total: int, warmup: float) -> float:
    """BertAdam's factor on the learning rate: up to 1 over a part of the training, then down to 0 at its end.

    Unlike the schedule `linear`, the warm-up is not rounded to whole steps, so its peak may fall between two.

    Args:
        step: optimizer steps taken before this one.
        total: steps of the training.
        warmup: part of them in which the rate rises, 0..1.
    """
    done = step / total
    return done / warmup if done < warmup else max((done - 1) / (warmup - 1), 0.0)
