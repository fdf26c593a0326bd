"""A student with fewer layers: some blocks of a model are left out, the others keep their weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from qpipe.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)
PLAIN = (bool, int, float, str)
"""Types of attributes that decide what a module computes. Rates of dropout act in training alone."""


def chosen_layers(wanted: Literal["every-other"] | Sequence[int], depth: int) -> list[int]:
    """Numbers of the blocks that are kept, from 0.

    `every-other` keeps the second, the fourth and so on, and so the last of an even number: SkipBERT in Wu et al.,
    "Extreme Compression for Pre-trained Transformers Made Simple and Efficient" (2022), section 4.

    Args:
        wanted: `every-other`, or the numbers themselves.
        depth: blocks that the model has.

    Raises:
        ConfigError: a number is repeated, or names no block, or none is left.
    """
    layers = list(range(1, depth, 2)) if wanted == "every-other" else [int(layer) for layer in wanted]
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0 or max(layers) >= depth:
        raise ConfigError(
            f"model.keep_layers {wanted if wanted == 'every-other' else layers} must name at least one of the blocks 0 "
            f"to {depth - 1} that the model has, each once"
        )
    return layers


def keep_layers(model: nn.Module, blocks: Sequence[str], wanted: Literal["every-other"] | Sequence[int]) -> None:
    """Leave out all blocks but some, in place, and say so in the model's configuration.

    Args:
        model: as loaded, of one of transformers' classes.
        blocks: paths of its blocks, in order.
        wanted: see `chosen_layers`.

    Raises:
        ModelError: the blocks of the model are not known, are not in one list, or depend on their place.
        ConfigError: `wanted` does not fit.
    """
    parents = {path.rpartition(".")[0] for path in blocks}
    holder = parents.pop() if len(parents) == 1 else None
    found = None if holder is None else model.get_submodule(holder)
    config: Any = getattr(model, "config", None)
    if not isinstance(found, nn.ModuleList) or config is None or len(found) != len(blocks):
        raise ModelError(
            f"model.keep_layers: the blocks of {type(model).__name__} are not known as one list; use a family such as "
            "BERT, RoBERTa, DistilBERT, ViT or LLaMA, or leave it out"
        )
    layers = chosen_layers(wanted, len(blocks))
    kept = [found[layer] for layer in layers]
    for position, block in enumerate(kept):
        for module in block.modules():  # decoders number their caches so
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
    assert holder is not None
    parent, _, name = holder.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[layer] for layer in layers]
    _require_same_when_loaded(model, [f"{holder}.{position}" for position in range(len(kept))])


def _require_same_when_loaded(model: nn.Module, blocks: Sequence[str]) -> None:
    """Refuse blocks that depend on their place: loaded from a checkpoint, the model would be another.

    Raises:
        ModelError: a module or a number in a block would differ, or the number of blocks.
    """
    try:
        with torch.device("meta"):
            again = type(model)(model.config)
    except Exception as error:  # whatever a class outside transformers raises
        logger.warning("whether %s is the same when it is loaded again cannot be told: %s", type(model).__name__, error)
        return
    holder = blocks[0].rpartition(".")[0]
    depth = len(list(again.get_submodule(holder).children()))
    if depth != len(blocks):
        raise ModelError(
            f"model.keep_layers: {type(model).__name__} with {len(blocks)} blocks would have {depth} when the saved "
            "model is loaded, since its configuration keeps their number elsewhere; leave it out"
        )
    for path in blocks:
        here, there = _described(model.get_submodule(path)), _described(again.get_submodule(path))
        differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differ:
            name = differ[0]
            raise ModelError(
                f"model.keep_layers: {path} of {type(model).__name__} depends on its place: {name} is "
                f"{here.get(name)}, and would be {there.get(name)} when the saved model is loaded; keep other layers, "
                "or leave it out"
            )


def _described(block: nn.Module) -> dict[str, object]:
    """Classes and plain attributes of the modules in a block, and the shapes of its parameters, by name."""
    found: dict[str, object] = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for path, module in block.named_modules():
        if "drop" in path.rpartition(".")[2]:
            continue
        found[path or "the block"] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and "drop" not in name and name != "training" and isinstance(value, PLAIN):
                found[f"{path}.{name}".lstrip(".")] = value
    return found
