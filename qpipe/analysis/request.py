"""Request: what `qpipe analyze` is asked to measure, and what each number depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from qpipe.analysis.groups import By
from qpipe.analysis.landscape import Filters
from qpipe.errors import ConfigError, suggest
from qpipe.types import Json

FEW = 256
"""Examples for the parts that go over them many times."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "ablation": ("by", "sites", "examples", "within", "bits"),
    "outliers": ("sites", "sequences"),
    "ranges": ("sites", "sequences"),
    "attention": ("sequences",),
    "noise": ("sequences",),
    "layers": ("examples", "teacher", "layer_map"),
    "ranking": ("sequences", "teacher", "text", "layer_map"),
    "hessian": ("few", "eigenvalues", "norm_weight"),
    "landscape": ("few", "points", "filters"),
    "curves": (),
}
"""Of each part: the settings that its numbers depend on, besides the model."""

NEEDS_TEACHER = ("layers", "ranking")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        parts: any of `SETTINGS`.
        by: how quantized activations are grouped for the ablation.
        sites: patterns over activation sites for ablation, outliers and ranges; none: all that are quantized for the
            first, and see `Session.looked_at` for the others.
        examples: examples that ablation, layers, hessian and landscape evaluate. None: all of the validation split;
            `FEW` for the last two.
        sequences: validation examples whose activations are looked at.
        within: largest loss of the metric that a suggested plan may have; None: suggest none.
        bits: width of the sites that a suggestion picks.
        teacher: the model to compare with; None: the one that the run learned from.
        text: a sentence whose attention maps are shown; None: the first validation example.
        eigenvalues: of each batch.
        norm_weight: factor of the sum of the parameters' norms in the loss whose Hessian is taken.
        points: of the landscape along each direction.
        filters: what the landscape's directions are scaled by.
        layer_map: the teacher's layer, from 1, that each layer of the model is compared with; with one number more,
            first, the teacher's hidden state for what the first block receives. None: as the run says.
    """

    parts: tuple[str, ...]
    by: By = "role"
    sites: tuple[str, ...] = ()
    examples: int | None = None
    sequences: int = 10
    within: float | None = None
    bits: int = 16
    teacher: str | None = None
    text: str | None = None
    eigenvalues: int = 3
    norm_weight: float = 0.0
    points: int = 11
    filters: Filters = "rows"
    layer_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in SETTINGS:
                raise ConfigError(f"part {part!r} is unknown{suggest(part, SETTINGS)}; there are {', '.join(SETTINGS)}")
        if self.within is not None and "ablation" not in self.parts:
            raise ConfigError("a plan is suggested from the ablation: name the part `ablation` too")
        if self.points < 3 or self.points % 2 == 0:
            raise ConfigError(
                f"a landscape has an odd number of points, 3 or more, to meet the model; not {self.points}"
            )
        require_used(self.parts, [key for key in ("layer_map", "teacher", "text") if getattr(self, key) is not None])
        if self.layer_map is not None:
            self._check_map(self.layer_map)

    def _check_map(self, layers: Sequence[int]) -> None:
        if any(below >= above for below, above in pairwise(layers)):
            raise ConfigError(
                f"--layer-map {','.join(map(str, layers))} must rise from each number to the next: name another of the "
                "teacher's layers for each layer of the model"
            )

    @property
    def few(self) -> int:
        """Examples of the parts that go over them many times."""
        return self.examples or FEW

    def settings(self, part: str) -> dict[str, Json]:
        """What the numbers of a part depend on, besides the model."""
        values = {**asdict(self), "few": self.few}
        found = {key: values[key] for key in SETTINGS[part]}
        return {
            "examples" if key == "few" else key: list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
        }


def require_used(parts: Sequence[str], keys: Iterable[str]) -> None:
    """Refuse settings that none of the parts uses.

    Args:
        parts: any of `SETTINGS`.
        keys: names of settings that were given.

    Raises:
        ConfigError: there is one.
    """
    for key in keys:
        names = {key, "few"} if key == "examples" else {key}
        using = [part for part, settings in SETTINGS.items() if names.intersection(settings)]
        if not set(parts).intersection(using):
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{option} is for {' and '.join(using)}, not for {', '.join(parts)}: add --parts {using[0]}, or "
                f"leave {option} out"
            )
