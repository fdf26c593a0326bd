"""Access to q, k, v, scores, probabilities and context of any model that follows transformers' attention interface.

transformers looks the attention function up by name on every call and hands it the attention module. qpipe registers
one function that passes the call on to the module's own `AttentionSites`; nothing else is global.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qpipe.errors import ModelError
from qpipe.model.taps import Tap, run_taps
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.types import MAP_SLOTS, Slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "qpipe"
SLOTS: tuple[Slot, ...] = ("query", "key", "value", "raw_scores", "scores", "probs", "context")
VISIBLE = "visible"
"""What is captured of the mask. No slot: nothing changes it, and no quantizer sits there."""
NOT_COMPUTED = ("softcap", "s_aux", "sinks", "indices", "block_indices")
"""Arguments of attention functions that change what is computed, and that the fused kernel refuses or overlooks: caps,
sinks, and the choice of keys in sparse attention."""
NOT_IN_MAPS = ("position_bias",)
"""Those that the kernel takes, and explicit maps do not."""


class AttentionSites(nn.Module):
    """Taps and quantizers within one attention call; a child of the attention module it serves.

    Shapes: query `[B, H, T, d]`, key and value `[B, Hkv, T, d]`, raw_scores (query times key), scores (scaled), probs
    `[B, H, T, T]`, context `[B, T, H, d]`.
    """

    def __init__(self, path: str, context: QuantContext) -> None:
        super().__init__()
        self.path = path
        self.context = context
        self.quantizers = nn.ModuleDict()
        self.called = False
        self.taps: dict[str, list[Tap]] = {slot: [] for slot in (*SLOTS, VISIBLE)}

    def host(self, slot: str, quantizer: Quantizer) -> None:
        """Put a quantizer at a slot."""
        self.quantizers[slot] = quantizer

    def taps_at(self, slot: str) -> list[Tap]:
        """The taps at a slot, in stage order; the list itself."""
        return self.taps[slot]

    def at(self, slot: str, x: Tensor) -> Tensor:
        """Run what sits at a slot."""
        x = run_taps(self.taps[slot], x, self.context)
        return self.quantizers[slot](x) if slot in self.quantizers else x

    def needs_map(self) -> bool:
        """True if anything at scores or probs is active now; otherwise the fused kernel computes the attention."""
        if self.context.enabled and any(slot in self.quantizers for slot in MAP_SLOTS):
            return True
        return any(tap.acts(self.context) for slot in MAP_SLOTS for tap in self.taps[slot])

    def expects_map(self) -> bool:
        """True if anything at scores or probs needs a map, now or in some step of the training."""
        if any(slot in self.quantizers for slot in MAP_SLOTS):
            return True
        return any(tap.may_act() for slot in MAP_SLOTS for tap in self.taps[slot])

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer: `(context [B, T, H, d], probabilities or None)`.

        Raises:
            ModelError: the attention has what is not computed here, or not in maps while something needs maps. It is
                raised in the first forward pass, also where maps are needed only in a later step of the training.
        """
        self.called = True
        refuse_unsupported(f"{self.path} ({type(module).__name__})", kwargs, self.expects_map())
        query, key, value = self.at("query", query), self.at("key", key), self.at("value", value)
        causal = self._is_causal(module, kwargs)
        if any(tap.acts(self.context) for tap in self.taps[VISIBLE]):
            shape = (query.shape[0], query.shape[2], key.shape[2])
            run_taps(self.taps[VISIBLE], visible_pairs(shape, attention_mask, causal, query.device), self.context)
        if not self.needs_map():
            context, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return self.at("context", context), None
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        raw = self.at("raw_scores", torch.matmul(query, key.transpose(-1, -2)))
        scores = self.at("scores", raw * scaling)
        scores = masked(scores, attention_mask, causal)
        probs = self.at("probs", torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype))
        dropped = nn.functional.dropout(probs, dropout, module.training)
        context = torch.matmul(dropped, value).transpose(1, 2).contiguous()
        return self.at("context", context), probs

    @staticmethod
    def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("is_causal")
        # As the fused function of transformers takes modules that do not say.
        return bool(getattr(module, "is_causal", True) if given is None else given)


def refuse_unsupported(attention: str, kwargs: Mapping[str, Any], maps: bool) -> None:
    """Refuse to compute another attention than the model's.

    Args:
        attention: the attention module, for the message.
        kwargs: what the model passes to its attention function.
        maps: whether explicit maps are needed.

    Raises:
        ModelError: it passes something that is not supported.
    """
    for name in NOT_COMPUTED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{attention} uses {name!r} in its attention, which qpipe's attention function does not compute; leave "
                "out rules for sites within the attention, and plugins that take signals of the model"
            )
    for name in NOT_IN_MAPS if maps else ():
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{attention} uses {name!r} in its attention, which explicit attention maps do not support; leave out "
                "rules and plugins that need scores or probs"
            )


def masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores with masked entries at the smallest value; accepts boolean (True = keep), additive and missing masks."""
    queries, keys = scores.shape[-2:]
    if mask is None and causal and queries > 1:
        mask = earlier_keys(queries, keys, scores.device)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def earlier_keys(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean `[queries, keys]`: True at keys no later than the query; the last query is at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def visible_pairs(shape: tuple[int, int, int], mask: Tensor | None, causal: bool, device: torch.device) -> Tensor:
    """Which pairs of query and key the softmax sees, as `masked` has it.

    Args:
        shape: batch, queries, keys.
        mask: boolean (True = seen) or additive, `[batch or 1, heads or 1, queries or 1, keys]`; None: as `causal` says.
        causal: True if, without a mask, no query sees a later key.
        device: where the result belongs.

    Returns:
        Boolean, `[batch, heads or 1, queries, keys]`.
    """
    batch, queries, keys = shape
    if mask is None:
        seen = earlier_keys(queries, keys, device) if causal else torch.ones(1, 1, dtype=torch.bool, device=device)
        return seen.expand(batch, 1, queries, keys)
    # Additive masks hide by the smallest number, which a bias may have moved a little.
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.expand(batch, -1, queries, keys)


def dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: pass the call on to the module's sites."""
    sites = module._modules.get("qpipe_sites")
    if sites is None:
        refuse_unsupported(type(module).__name__, kwargs, False)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return sites(module, query, key, value, attention_mask, **kwargs)


# Both must be registered: without the mask function transformers passes no mask at all, silently.
AttentionInterface.register(NAME, dispatch)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: nn.Module, paths: tuple[str, ...], context: QuantContext) -> dict[str, AttentionSites]:
    """Give every attention module its sites and switch the model to qpipe's attention function.

    Raises:
        ModelError: the model does not follow the attention interface.
    """
    pretrained = cast("PreTrainedModel", model)
    pretrained.set_attn_implementation(NAME)
    if pretrained.config._attn_implementation != NAME:
        raise ModelError(
            f"{type(model).__name__} does not follow transformers' attention interface, so its attention cannot be "
            "observed or quantized; use a model family that does (BERT, RoBERTa, ViT, LLaMA, ...), or rules for "
            "weights, inputs and outputs only"
        )
    result = {}
    for path in paths:
        sites = AttentionSites(path, context)
        model.get_submodule(path).add_module("qpipe_sites", sites)
        result[path] = sites
    return result


def attention_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the attention modules, from transformers' own record of which class that is, in order."""
    return recorded_paths(model, "attentions")


def recorded_paths(model: nn.Module, kind: str) -> tuple[str, ...]:
    """Paths of the modules whose outputs transformers records as `attentions` or `hidden_states`."""
    classes: tuple[type, ...] = ()
    for module in model.modules():
        record = getattr(module, "_can_record_outputs", None) or {}
        entries = record.get(kind) or ()
        for entry in entries if isinstance(entries, list | tuple) else (entries,):
            target = getattr(entry, "target_class", entry)
            classes += (target,) if isinstance(target, type) else ()
    if not classes:
        return ()
    return tuple(name for name, module in model.named_modules() if isinstance(module, classes))
