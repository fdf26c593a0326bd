"""Analyze: run the parts that are asked for, keep each result as soon as it is there, and go on where it was left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qpipe.analysis.ablation import WEIGHTS, Effect, ablate, limited
from qpipe.analysis.attention import attention_maps
from qpipe.analysis.groups import By, grouped, quantized, select
from qpipe.analysis.noise import signal_to_noise
from qpipe.analysis.observe import Example, collect, examples
from qpipe.analysis.outliers import outliers, token_ranges
from qpipe.analysis.suggest import suggest
from qpipe.errors import ConfigError, SiteError
from qpipe.errors import suggest as nearest
from qpipe.files import write_json
from qpipe.report.inputs import ANALYSIS_FOLDER, read_json
from qpipe.run import Run
from qpipe.types import Json

PER_TOKEN = ("input", "output", "sum", "stream")
"""Slots whose tensors may be `[batch, tokens, features]`."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        parts: any of `PARTS`.
        by: how quantized activations are grouped for the ablation.
        sites: patterns over activation sites for ablation, outliers and ranges; none: all.
        examples: validation examples that the ablation evaluates; None: all.
        sequences: validation examples whose activations are looked at.
        within: largest loss of the metric that a suggested plan may have; None: suggest none.
        bits: width of the sites that a suggestion picks.
    """

    parts: tuple[str, ...]
    by: By = "role"
    sites: tuple[str, ...] = ()
    examples: int | None = None
    sequences: int = 10
    within: float | None = None
    bits: int = 16

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"part {part!r} is unknown{nearest(part, PARTS)}; there are {', '.join(PARTS)}")
        if self.within is not None and "ablation" not in self.parts:
            raise ConfigError("a plan is suggested from the ablation: name the part `ablation` too")

    def settings(self, part: str) -> dict[str, Json]:
        """What the numbers of a part depend on, besides the model."""
        names = {"ablation": ("by", "sites", "examples", "within", "bits"), "outliers": ("sites", "sequences")}
        names["ranges"] = names["outliers"]
        chosen = names.get(part, ("sequences",))
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key in chosen
        }


Told = Callable[[str], None]


def _ablation(run: Run, request: Request, told: Told) -> dict[str, Json]:
    run = replace(run)
    limited(run, request.examples)
    weights, activations = quantized(run)
    groups = {WEIGHTS: weights} if weights and not request.sites else {}
    groups |= grouped(select(run, activations, request.sites), request.by, run.instruments.map.sites)

    def effect(found: Effect) -> None:
        told(f"{found.group}: without {found.without:.4f}, alone {found.alone:.4f}")

    result = {**ablate(run, groups, effect), "suggestion": None}
    if request.within is not None:
        kept = {**result, "groups": [entry for entry in result["groups"] if entry["group"] != WEIGHTS]}
        result["suggestion"] = suggest(
            run,
            kept,
            groups,
            request.within,
            request.bits,
            lambda group, value: told(f"more bits: {group}: {value:.4f}"),
        )
    return result


def _sequences(run: Run, request: Request) -> tuple[list[Example], dict[str, list[Any]]]:
    """Examples, and the values `[tokens, features]` at every activation site of that form."""
    sample = examples(run, request.sequences)
    every = [name for name, site in run.instruments.sites.items() if site.slot in PER_TOKEN]
    with_role = {name for names in run.instruments.map.sites.values() for name in names}
    first = [name for name in every if name in run.plan.sites] or [name for name in every if name in with_role]
    names = select(run, every if request.sites or not first else first, request.sites)
    lengths = [len(next(iter(example.batch.values()))[0]) for example in sample]
    values = collect(run, names, sample)
    fitting = {
        name: seen
        for name, seen in values.items()
        if all(v.ndim == 2 for v in seen) and _same_tokens(seen, sample, lengths)
    }
    if not fitting:
        raise SiteError("no site gives [tokens, features]; choose others with --sites")
    return sample, fitting


def _same_tokens(seen: list[Any], sample: list[Example], lengths: list[int]) -> bool:
    return len(seen) == len(sample) and (not sample[0].tokens or [len(v) for v in seen] == lengths)


def _outliers(run: Run, request: Request, told: Told) -> dict[str, Json]:
    sample, values = _sequences(run, request)
    tokens = [example.tokens for example in sample]
    return {"sites": {name: outliers(seen, tokens) for name, seen in values.items()}}


def _ranges(run: Run, request: Request, told: Told) -> dict[str, Json]:
    sample, values = _sequences(run, request)
    tokens = [example.tokens for example in sample]
    return {"tokens": tokens, "sites": {name: token_ranges(seen) for name, seen in values.items()}}


def _attention(run: Run, request: Request, told: Told) -> dict[str, Json]:
    names = [f"{path}:probs" for path in run.instruments.map.attention]
    if not names:
        raise ConfigError(f"{type(run.student).__name__} has no attention that could be observed; leave the part out")
    sample = examples(run, request.sequences)
    values = collect(run, names, sample)
    separator = getattr(run.data.tokenizer, "sep_token", None)
    spots = [[at for at, token in enumerate(example.tokens) if token == separator] for example in sample]
    return {"tokens": sample[0].tokens, "layers": names, **attention_maps([values[name] for name in names], spots)}


def _noise(run: Run, request: Request, told: Told) -> dict[str, Json]:
    quantized(run)
    return {"sites": signal_to_noise(run, examples(run, request.sequences))}


PARTS: Mapping[str, Callable[[Run, Request, Told], dict[str, Json]]] = {
    "ablation": _ablation,
    "outliers": _outliers,
    "ranges": _ranges,
    "attention": _attention,
    "noise": _noise,
}
"""What can be measured, by name."""


def analyze(run: Run, request: Request, again: bool = False, told: Told = lambda text: None) -> dict[str, Json]:
    """Measure what is asked for, and write `analysis/PART.json` into the run directory after each part.

    Args:
        run: a run on one process with its quantizers in place, and calibrated.
        request: what to measure.
        again: measure parts anew that were measured before with the same settings.
        told: called with a line about every step.

    Returns:
        The results by part.

    Raises:
        ConfigError: a part does not fit the run.
        SiteError: a pattern matches no site.
    """
    found = {}
    for part in request.parts:
        path = run.out / ANALYSIS_FOLDER / f"{part}.json"
        settings = request.settings(part)
        before = None if again else read_json(path)
        if before is not None and before["settings"] == settings:
            told(f"{part}: measured before")
            found[part] = before
            continue
        told(f"{part}:")
        found[part] = {"settings": settings, **PARTS[part](run, request, told)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found[part])
    return found
