"""The parts of an analysis, by name: each takes a session and returns plain JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from qpipe.analysis.ablation import WEIGHTS, Effect, ablate, limited
from qpipe.analysis.attention import attention_maps
from qpipe.analysis.curvature import hessian, landscape
from qpipe.analysis.curves import curves
from qpipe.analysis.groups import grouped, quantized, select
from qpipe.analysis.heads import probabilities, ranking
from qpipe.analysis.layers import layers
from qpipe.analysis.noise import signal_to_noise
from qpipe.analysis.session import Session
from qpipe.analysis.suggest import suggest
from qpipe.types import Json


def _ablation(session: Session) -> dict[str, Json]:
    run, request = replace(session.run), session.request
    limited(run, request.examples)
    weights, activations = quantized(run)
    groups = {WEIGHTS: weights} if weights and not request.sites else {}
    groups |= grouped(select(run, activations, request.sites), request.by, run.instruments.map.sites)

    def effect(found: Effect) -> None:
        session.told(f"{found.group}: without {found.without:.4f}, alone {found.alone:.4f}")

    result = {**ablate(run, groups, effect), "suggestion": None}
    if request.within is not None:
        kept = {**result, "groups": [entry for entry in result["groups"] if entry["group"] != WEIGHTS]}
        result["suggestion"] = suggest(
            run,
            kept,
            groups,
            request.within,
            request.bits,
            lambda group, value: session.told(f"more bits: {group}: {value:.4f}"),
        )
    return result


def _outliers(session: Session) -> dict[str, Json]:
    return {"sites": {name: look.outliers for name, look in session.looks.items()}}


def _ranges(session: Session) -> dict[str, Json]:
    tokens = [example.tokens for example in session.sample]
    return {"tokens": tokens, "sites": {name: look.ranges for name, look in session.looks.items()}}


def _attention(session: Session) -> dict[str, Json]:
    run = session.run
    separator = getattr(run.data.tokenizer, "sep_token", None)
    spots = [[at for at, token in enumerate(e.tokens) if token == separator] for e in session.sample]
    names = [f"{path}:probs" for path in run.instruments.map.attention]
    with session.activations_as_they_are():
        maps = attention_maps(probabilities(session, run, session.sample), spots)
    return {"tokens": session.sample[0].tokens, "layers": names, **maps}


def _noise(session: Session) -> dict[str, Json]:
    quantized(session.run)
    return {"sites": signal_to_noise(session.run, session.sample)}


PARTS: Mapping[str, Callable[[Session], dict[str, Json]]] = {
    "ablation": _ablation,
    "outliers": _outliers,
    "ranges": _ranges,
    "attention": _attention,
    "noise": _noise,
    "layers": layers,
    "ranking": ranking,
    "hessian": hessian,
    "landscape": landscape,
    "curves": lambda session: curves(session.out),
}
"""What can be measured; `request.SETTINGS` has the same names."""
