"""Named lists of rules, so that common schemes need no patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qpipe.errors import ConfigError, suggest
from qpipe.types import ModelMap, Rule

EMBEDDING = Rule("{embedding}:weight", "uniform", {"bits": 8})
ACTIVATIONS = Rule("{block}.*:input", "uniform-activation", {"bits": 8})


EVERY_WEIGHT = (
    Rule("*:weight", "uniform", {"bits": 8, "granularity": "tensor"}),
    Rule("{norm}:weight", "uniform", {"bits": 8, "granularity": "tensor"}),
)
INPUTS = tuple(
    Rule(f"{{block}}.*:{slot}", "uniform-activation", {"bits": 8, "granularity": "tensor"})
    for slot in ("input", "query", "key", "value", "probs")
)
"""Operands of the products in the blocks: the scheme of Zhang et al. (EMNLP 2020, arXiv:2009.12812)."""
CLIPPED = tuple(replace(rule, options={**rule.options, "narrow": True, "clip": 2.5}) for rule in INPUTS)
"""The same with the ranges of their code. It also quantizes the pooler's input, and the probabilities after dropout."""
OUTPUTS = Rule(
    "{outputs}",
    "uniform-activation",
    {"bits": 8, "granularity": "tensor", "dynamic": False, "symmetric": False},
)
"""What every operation returns: 161 tensors in BERT-base. Bondarenko et al. (EMNLP 2021), section 4."""


def _outputs(sites: str, **options: Any) -> Rule:
    return replace(OUTPUTS, site=sites, options={**OUTPUTS.options, "bits": 16, **options})


W8A8 = (*EVERY_WEIGHT, OUTPUTS)
SUM = (_outputs("{ffn_sum}"),)
FFN = (_outputs("{ffn_input}"), _outputs("{ffn_output}"), *SUM)
LOGITS = (_outputs("{logits}", range="mse-golden"),)
"""16 bits where 8 cost most: Bondarenko et al. (EMNLP 2021), table 4. 36 of 161 activations are `FFN`."""


def _weights(bits: int) -> tuple[Rule, ...]:
    return Rule("{block}.*:weight", "uniform", {"bits": bits}), EMBEDDING


PRESETS: dict[str, tuple[Rule, ...]] = {
    **{f"w{bits}": _weights(bits) for bits in (8, 4, 3, 2)},
    **{f"w{bits}a8": (*_weights(bits), ACTIVATIONS) for bits in (8, 4, 3, 2)},
    "a8": (EMBEDDING, ACTIVATIONS),
    "a8-inputs": INPUTS,
    "a8-inputs-clipped": CLIPPED,
    "w8a8-inputs": (*_weights(8), *INPUTS),
    "a8-outputs": (OUTPUTS,),
    "w8a8-outputs": W8A8,
    "w8a8-mixed-sum": (*W8A8, *SUM),
    "w8a8-mixed-ffn": (*W8A8, *FFN),
    "w8a8-mixed": (*W8A8, *FFN, *LOGITS),
}
"""`wB`: B-bit block weights per channel and an 8-bit embedding; `wBa8`: also 8-bit inputs of every linear map in the
blocks, range per token; `a8`: without block weights, for plugins that bring their own. Where a model has no such
embedding, as those of images, the presets leave it out.

`-inputs`: 8-bit operands of every product in the blocks, symmetric, range of each batch per tensor; `-clipped`: of
values cut at 2.5, with as many levels below 0 as above. `-outputs`: 8 bits for what every operation in the model
returns, asymmetric, calibrated range per tensor; `w8a8-outputs` also has every weight, those of normalisations
included, symmetric per tensor, as the paper does. The `-mixed` ones are `w8a8-outputs` with 16 bits for some
activations: `w8a8-mixed-sum` for the sum after the feed-forward network; `w8a8-mixed-ffn` also for input and output;
`w8a8-mixed` also for the logits, whose range has the least squared error."""


def preset_rules(name: str | None, model_map: ModelMap | None = None) -> tuple[Rule, ...]:
    """The rules of a preset; none for None.

    Args:
        name: of the preset.
        model_map: the parts of the model; the rule for the embedding is left out where it has none. None: all rules.

    Raises:
        ConfigError: no preset has that name.
    """
    if name is None:
        return ()
    if name not in PRESETS:
        raise ConfigError(
            f"quantization.preset {name!r} is unknown{suggest(name, PRESETS)}; available: "
            f"{', '.join(sorted(PRESETS))}, or null"
        )
    without = model_map is not None and model_map.embedding is None
    return tuple(rule for rule in PRESETS[name] if not (without and rule is EMBEDDING))


FIXED_GRID = "uniform-static"
"""What `uniform` becomes where weights are quantized before training."""


def with_fixed_grid(rule: Rule, options: Mapping[str, Any]) -> Rule:
    """The rule with `uniform-static` in place of `uniform`; other rules are returned as they are.

    Args:
        rule: a rule.
        options: further options of `uniform-static`; those of the rule come first.
    """
    if rule.quantizer != "uniform":
        return rule
    return replace(rule, quantizer=FIXED_GRID, options={**options, **rule.options})
