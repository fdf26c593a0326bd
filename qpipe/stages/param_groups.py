"""Parameter groups of the optimizer, from what plugins and built-ins contribute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qpipe.errors import PluginError
from qpipe.host import BUILTIN_PREFIX
from qpipe.run import Run
from qpipe.types import ParamGroup


def parameter_groups(run: Run) -> list[dict[str, Any]]:
    """Groups for `torch.optim`, from the contributions of plugins; those of built-ins give way to others.

    Raises:
        PluginError: two plugins claim one parameter.
    """
    contributions = run.host.collect_list("qpipe_param_groups", run=run)
    base: dict[str, Any] = {"weight_decay": run.config.train.weight_decay, "name": "default"}
    groups: dict[str, dict[str, Any]] = {"default": {"params": [], **base}}
    for name, parameter in run.student.named_parameters():
        if not parameter.requires_grad:
            continue
        group = _claim(name, parameter, contributions)
        if group is None:
            groups["default"]["params"].append(parameter)
            continue
        decay = base["weight_decay"] if group.weight_decay is None else group.weight_decay
        entry = groups.setdefault(group.name, {"params": [], "weight_decay": decay, "name": group.name})
        entry["lr"] = run.config.train.learning_rate * group.lr_scale
        entry["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _claim(name: str, parameter: nn.Parameter, contributions: Iterable[tuple[str, ParamGroup]]) -> ParamGroup | None:
    claims = [(source, group) for source, group in contributions if group.match(name, parameter)]
    strong = [claim for claim in claims if not claim[0].startswith(BUILTIN_PREFIX)] or claims
    if len(strong) > 1:
        raise PluginError(
            f"parameter {name!r} is claimed by group {strong[0][1].name!r} of {strong[0][0]!r} and group "
            f"{strong[1][1].name!r} of {strong[1][0]!r}; narrow one of them"
        )
    return strong[0][1] if strong else None
