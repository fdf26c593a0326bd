"""The sites of operations' outputs, by role, in the model families of transformers whose blocks qpipe knows.

The scheme is that of Bondarenko et al., "Understanding and Overcoming the Challenges of Efficient Transformer
Quantization" (EMNLP 2021): every tensor that an operation returns is quantized once, where it is made. An activation
function counts as one with the map before it, and so do rotation and normalisation of queries and keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qpipe.model.roles import ROLES
from qpipe.quant.hosts import ACTIVATIONS
from qpipe.types import ModelMap

Sites = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class BlockNames:
    """Names of modules within a block.

    Attributes:
        attention_norm: normalisation of attention; after it, or before it where `first`.
        ffn_norm: normalisation of the feed-forward network, likewise.
        activation: activation function of the feed-forward network.
        down: its last linear map.
        up: in gated networks, the linear map whose output is multiplied with the activation's; else empty.
        first: True if branches normalise first, so that a residual stream runs through the blocks unnormalised.
    """

    attention_norm: str
    ffn_norm: str
    activation: str
    down: str
    up: str = ""
    first: bool = False

    def present(self) -> list[str]:
        """The names that a block of this kind has."""
        return [n for n in (self.attention_norm, self.ffn_norm, self.activation, self.down, self.up) if n]


KNOWN = (
    BlockNames("attention.output.LayerNorm", "output.LayerNorm", "intermediate.intermediate_act_fn", "output.dense"),
    BlockNames("sa_layer_norm", "output_layer_norm", "ffn.activation", "ffn.lin2"),
    BlockNames("layernorm_before", "layernorm_after", "mlp.activation_fn", "mlp.fc2", first=True),
    BlockNames(
        "input_layernorm", "post_attention_layernorm", "mlp.act_fn", "mlp.down_proj", up="mlp.up_proj", first=True
    ),
)
"""BERT, RoBERTa, ERNIE and their like; DistilBERT; ViT; LLaMA, Qwen and their like."""

ADDITIONS: Mapping[str, tuple[str, ...]] = {
    **{
        f"{family}Embeddings": ("word_embeddings", "token_type_embeddings", "position_embeddings")
        for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Ernie")
    },
    "Embeddings": ("word_embeddings", "position_embeddings"),
}
"""Classes that hold embedding tables, in the order in which their forward pass adds them; the last is DistilBERT's."""


def added_embeddings(model: nn.Module, embedding: str | None) -> tuple[str, ...]:
    """Paths of the tables that are added to the input embedding, itself first; empty if the order is unknown."""
    if embedding is None:
        return ()
    parent, _, own = embedding.rpartition(".")
    module = model.get_submodule(parent)
    names = ADDITIONS.get(type(module).__name__, (own,))
    tables = [name for name, child in module.named_children() if isinstance(child, nn.Embedding)]
    if isinstance(getattr(module, "task_type_embeddings", None), nn.Embedding):
        names += ("task_type_embeddings",)
    return tuple(f"{parent}.{name}" for name in names) if set(tables) == set(names) and own == names[0] else ()


def with_sites(model: nn.Module, found: ModelMap) -> ModelMap:
    """The map with its sites by role; with none if the model is built of blocks that are not known here."""
    names = _names(model, found)
    stem = _stem(model, found, names) if names else None
    if names is None or stem is None or not found.head:
        return found
    sites: dict[str, list[str]] = {role: [] for role in ROLES}
    for part in (stem, *_blocks(model, found, names), _end(model, found, names)):
        for role, added in part.items():
            sites[role] += added
    return replace(found, sites={role: tuple(added) for role, added in sites.items() if added})


def _names(model: nn.Module, found: ModelMap) -> BlockNames | None:
    if not found.blocks or not found.attention_output or len(found.blocks) != len(found.attention):
        return None
    for names in KNOWN:
        if all(_fits(model, found, block, names) for block in found.blocks):
            return names
    return None


def _fits(model: nn.Module, found: ModelMap, block: str, names: BlockNames) -> bool:
    modules = {name for name, _ in model.get_submodule(block).named_modules()}
    inside = [n for n in found.norms if n.startswith(f"{block}.") and not _within(n, found.attention)]
    expected = {f"{block}.{names.attention_norm}", f"{block}.{names.ffn_norm}"}
    return modules.issuperset(names.present()) and set(inside) == expected


def _within(path: str, parents: Iterable[str]) -> bool:
    return any(path.startswith(f"{parent}.") for parent in parents)


def _stem(model: Any, found: ModelMap, names: BlockNames) -> Sites | None:
    """What comes before the first block; None if it is not known."""
    if not names.first:
        norm = f"{(found.embedding or '').rpartition('.')[0]}.LayerNorm"
        if len(found.embeddings) < 2 or norm not in found.norms:
            return None
        sums = (*(f"{table}:sum" for table in found.embeddings[1:-1]), f"{norm}:input")
        return {"embedding_sum": sums, "embedding_output": (f"{norm}:output",)}
    if len(found.embeddings) == 1:
        if type(model.get_submodule(found.embeddings[0])) is not nn.Embedding:
            return None  # such as Gemma's, which scales what it looks up, and hosts nothing
        return {"embedding_output": (f"{found.embeddings[0]}:output",)}
    patches = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    parts = [n for n, m in model.named_modules() if patches and hasattr(m, "patch_embeddings")]
    if len(patches) != 1 or len(parts) != 1:
        return None
    return {"patch_embedding": (f"{patches[0]}:output",), "embedding_sum": (f"{parts[0]}:output",)}


def _blocks(model: nn.Module, found: ModelMap, names: BlockNames) -> list[Sites]:
    parts = zip(found.blocks, found.attention, found.attention_inputs, found.attention_output, strict=True)
    return [_block(model, names, *part) for part in parts]


def _block(
    model: nn.Module, names: BlockNames, block: str, attention: str, inputs: Sequence[str], output: str
) -> Sites:
    query, key, value = (f"{path}:output" for path in inputs)
    if "position_embeddings" in inspect.signature(model.get_submodule(attention).forward).parameters:
        query, key = f"{attention}:query", f"{attention}:key"  # rotated between projection and product
    before, after = f"{block}.{names.attention_norm}", f"{block}.{names.ffn_norm}"
    sites = {
        "query": query,
        "key": key,
        "value": value,
        "scores": f"{attention}:raw_scores",
        "probs": f"{attention}:probs",
        "context": f"{output}:input",
        "attention_output": f"{output}:output",
        "ffn_activation": f"{block}.{names.activation}:output",
        "ffn_output": f"{block}.{names.down}:output",
    }
    if names.up:
        sites |= {"ffn_up": f"{block}.{names.up}:output", "ffn_product": f"{block}.{names.down}:input"}
    if names.first:
        sites |= {"attention_input": f"{before}:output", "attention_sum": f"{after}:stream"}
        sites |= {"ffn_input": f"{after}:output", "ffn_sum": f"{block}:output"}
    else:
        sites |= {"attention_sum": f"{before}:input", "ffn_input": f"{before}:output"}
        sites |= {"ffn_sum": f"{after}:input", "block_output": f"{after}:output"}
    return {role: (site,) for role, site in sites.items()}


def _end(model: Any, found: ModelMap, names: BlockNames) -> Sites:
    """Final normalisation, pooler and head."""
    base = f"{model.base_model_prefix}."
    final = [n for n in found.norms if n.startswith(base) and not _within(n, found.blocks)] if names.first else []
    pooler = [n for n, m in model.named_modules() if n.startswith(f"{base}pooler.") and type(m) in ACTIVATIONS]
    inner = [n for n in found.norms if not n.startswith(base)]
    outputs = model.get_output_embeddings()
    last = next((n for n, m in model.named_modules() if m is outputs), found.head[-1])
    heads = _beside(model, found, last)
    between = [*(f"{n}:output" for n in pooler), *(f"{n}:input" for n in inner)]
    if len(found.head) > 1:
        between += [f"{n}:input" for n in heads]
    return {
        "final_output": tuple(f"{n}:output" for n in final),
        "pooler": tuple(between),
        "logits": tuple(f"{n}:output" for n in heads),
    }


def _beside(model: Any, found: ModelMap, last: str) -> list[str]:
    """The last module of the head, and those of its shape that work beside it, as the two of a distilled DeiT do."""
    module = model.get_submodule(last)
    if type(module) is not nn.Linear or module.in_features == module.out_features:  # a square one may come before it
        return [last]
    linear = ((n, model.get_submodule(n)) for n in found.head)
    return [n for n, m in linear if type(m) is nn.Linear and m.weight.shape == module.weight.shape] or [last]
