"""The same network from operations that quantize whole tensors only (paper, figure 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qpipe import ActivationRange, FixedActivation, FormatError

Record = Mapping[str, Any]
Member = TypeVar("Member")

PLACES = (("LayerNorm", "output"), ("Linear", "output"), ("LayerNorm", "input"))
"""Class and slot where x, h and y of a feed-forward network can be rewritten."""


@dataclass(frozen=True)
class FeedForward:
    """The sites of one block that share an order: input x, output h and residual sum y of its feed-forward network.

    Attributes:
        x: its activation as `quantization.json` has it, at the LayerNorm before the network.
        h: at the last linear map.
        y: at the LayerNorm after it.
        first: path of the first linear map.
    """

    x: Record
    h: Record
    y: Record
    first: str

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The features of each group, int64 `[features / K]` each."""
        return torch.tensor(self.x["order"]).chunk(len(self.x["scale"]))


class GroupQuantizers(nn.Module):
    """Cuts an ordered activation `[..., features]` into its groups, each quantized as a tensor of its own."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        settings = (record["bits"], False, "tensor", record["symmetric"])
        pairs = zip(record["scale"], record["zero_point"], strict=True)
        self.groups = nn.ModuleList(FixedActivation(ActivationRange(*settings, s, z)) for s, z in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Quantized groups side by side."""
        parts = x.chunk(len(self.groups), dim=-1)
        return torch.cat([quantizer(part) for quantizer, part in zip(self.groups, parts, strict=True)], dim=-1)


class OrderedNorm(nn.Module):
    """LayerNorm of features in order, quantized by group, at one end of a feed-forward network.

    At the begin features are put into order before they are normalised, and the result is quantized; at the end the
    ordered sum is quantized, normalised, and put back. Normalisation commutes with a permutation of features whose
    gains and biases are permuted too.
    """

    def __init__(self, norm: nn.LayerNorm, record: Record, begin: bool) -> None:
        super().__init__()
        weight = norm.weight
        order = torch.tensor(record["order"], device=weight.device)
        biased = norm.bias is not None
        self.norm = nn.LayerNorm(len(order), norm.eps, bias=biased, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            for name, parameter in self.norm.named_parameters():
                parameter.copy_(getattr(norm, name)[order])
        self.quantizers = GroupQuantizers(record).to(weight.device)
        self.begin = begin
        self.register_buffer("index", order if begin else order.argsort())
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`[..., features]` to the same shape."""
        if self.begin:
            normalised: Tensor = self.norm(x[..., self.index])
            return torch.as_tensor(self.quantizers(normalised))
        back: Tensor = self.norm(self.quantizers(x))[..., self.index]
        return back


class SplitInputs(nn.Module):
    """A linear map of an ordered input as the sum of one map for each group."""

    def __init__(self, linear: nn.Linear, parts: Iterable[Tensor]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_part(linear.weight[:, part], None) for part in parts)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]`, in order, to `[..., out_features]`."""
        parts = x.chunk(len(self.maps), dim=-1)
        total: Tensor = sum(part_map(part) for part_map, part in zip(self.maps, parts, strict=True))
        return total if self.bias is None else total + self.bias


class SplitOutputs(nn.Module):
    """A linear map whose outputs come in order: one map for each group, each quantized as a tensor of its own."""

    def __init__(self, linear: nn.Linear, record: Record, parts: Iterable[Tensor]) -> None:
        super().__init__()
        bias = linear.bias
        self.maps = nn.ModuleList(_part(linear.weight[p], None if bias is None else bias[p]) for p in parts)
        self.quantizers = GroupQuantizers(record).to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in order."""
        return torch.as_tensor(self.quantizers(torch.cat([part_map(x) for part_map in self.maps], dim=-1)))


def _part(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def rewrite(model: nn.Module, activations: Iterable[Record]) -> list[Record]:
    """Replace groups of features in a model by tensors of their own, for hardware that quantizes whole tensors only.

    In each block, the normalisation before the feed-forward network returns features in order, its first linear map is
    the sum of K maps, its last one K maps side by side, and the normalisation after it puts features back. Every value
    is quantized to the same integer as before; sums are formed in another order.

    Args:
        model: as `qpipe.load_native` gives it, of a family that normalises after the residual sum (BERT, RoBERTa,
            ERNIE, DistilBERT). It is changed.
        activations: the `activations` of its `quantization.json`.

    Returns:
        The activations that had no groups, for `qpipe.quantize_activations`.

    Raises:
        FormatError: groups lie elsewhere than at x, h and y of feed-forward networks, these do not share an order and a
            number of groups, or the model normalises before its branches.
    """
    records = list(activations)
    for layer in feed_forwards(model, records):
        _replace(model, layer)
    return [record for record in records if record["granularity"] != "group"]


def feed_forwards(model: nn.Module, activations: Iterable[Record]) -> list[FeedForward]:
    """What `rewrite` replaces, in the order of modules in the model.

    Args:
        model: before it is rewritten.
        activations: as for `rewrite`.

    Raises:
        FormatError: as `rewrite` does.
    """
    grouped = [record for record in activations if record["granularity"] == "group"]
    if not grouped:
        raise FormatError("no activation has groups of features, so there is nothing to rewrite")
    blocks, problems = by_block(
        (r["module"], r["slot"], type(model.get_submodule(r["module"])).__name__, r) for r in grouped
    )
    if problems:
        raise FormatError("; ".join(problems))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    layers = [_feed_forward(model, block, *members) for block, members in blocks.items()]
    return sorted(layers, key=lambda layer: place[layer.h["module"]])


def by_block(sites: Iterable[tuple[str, str, str, Member]]) -> tuple[dict[str, tuple[Member, ...]], list[str]]:
    """What belongs to x, h and y of each block, by its path; and what is wrong with sites that have groups elsewhere.

    Args:
        sites: path and slot of each activation with groups, class of its module, and anything.
    """
    found: dict[str, list[tuple[str, str, str, Member]]] = {}
    for site in sites:
        found.setdefault(_block(site[0]), []).append(site)
    blocks: dict[str, tuple[Member, ...]] = {}
    problems = []
    for block, members in found.items():
        kinds = {(kind, slot): member for _, slot, kind, member in members}
        if len(members) == len(PLACES) and set(kinds) == set(PLACES):
            blocks[block] = tuple(kinds[place] for place in PLACES)
        else:
            names = ", ".join(f"{path}:{slot}" for path, slot, _, _ in members)
            problems.append(
                f"{block or 'the model'} has groups at {names}; what can be rewritten has them at the output of the "
                "LayerNorm before the feed-forward network, the output of its last Linear, and the input of the "
                "LayerNorm after it (peg.sites as it is by default, in models that normalise after the residual sum)"
            )
    return blocks, problems


def _feed_forward(model: nn.Module, block: str, x: Record, h: Record, y: Record) -> FeedForward:
    if len({(tuple(r["order"]), len(r["scale"])) for r in (x, h, y)}) > 1:
        raise FormatError(f"{block}: its sites have orders or numbers of groups of their own; set peg.shared=true")
    last: Any = model.get_submodule(h["module"])
    name, first = _linear_before(model, h["module"])
    if (first.in_features, first.out_features) != (len(x["order"]), last.in_features):
        raise FormatError(f"{name} is not the linear map from {x['module']} to {h['module']}")
    return FeedForward(x, h, y, name)


def _block(module: str) -> str:
    """Path up to and with its last number."""
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _replace(model: nn.Module, layer: FeedForward) -> None:
    paths = (layer.x["module"], layer.first, layer.h["module"], layer.y["module"])
    modules: list[Any] = [model.get_submodule(path) for path in paths]
    before, first, last, after = modules
    parts = (
        OrderedNorm(before, layer.x, begin=True),
        SplitInputs(first, layer.parts),
        SplitOutputs(last, layer.h, layer.parts),
        OrderedNorm(after, layer.y, begin=False),
    )
    for path, part in zip(paths, parts, strict=True):
        model.set_submodule(path, part)


def _linear_before(model: nn.Module, path: str) -> tuple[str, nn.Linear]:
    """The linear map that precedes another one in its block, in the order of modules."""
    block = model.get_submodule(_block(path))
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    number = names.index(path.removeprefix(f"{_block(path)}."))
    if number == 0:
        raise FormatError(f"{path} has no linear map before it in its block")
    found: Any = block.get_submodule(names[number - 1])
    return f"{_block(path)}.{names[number - 1]}", found
