"""Session: one run under analysis, with what several parts need, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from qpipe.analysis.groups import select
from qpipe.analysis.ledger import Ledger
from qpipe.analysis.observe import Example, collect, examples
from qpipe.analysis.outliers import outliers, token_ranges
from qpipe.analysis.request import Request
from qpipe.analysis.teacher import Pairing, load_reference, pairing
from qpipe.analysis.weights import Role, Weights
from qpipe.errors import ConfigError, SiteError
from qpipe.report.inputs import ANALYSIS_FOLDER
from qpipe.run import Run
from qpipe.stages.variants import switched_off
from qpipe.types import Json

T = TypeVar("T")
Told = Callable[[str], None]

PER_TOKEN = ("input", "output", "sum", "stream")
"""Slots whose tensors may be `[batch, tokens, features]`."""
AT_ONCE = 32
"""Sites whose values are kept at a time: those of all sites of a large model would not fit into memory."""


def nowhere(role: Role, teacher: str | None) -> str | None:
    """The place of a model that is only in memory."""
    return None


@dataclass(frozen=True)
class Source:
    """What is analyzed.

    Attributes:
        out: the run directory, which gets the results.
        load: loads the run.
        where: takes a role and the teacher that was asked for, and says where that model is without loading it: its
            folder or name on the hub, None if that is not known.
    """

    out: Path
    load: Callable[[], Run]
    where: Callable[[Role, str | None], str | None] = nowhere


class Track(Protocol):
    """Shows how far a loop has come."""

    def __call__(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items, one after another."""


def untracked(items: Sequence[T], what: str) -> Iterable[T]:
    """The items; nothing is shown."""
    return items


class Look(NamedTuple):
    """Summaries of one site's values in the sample.

    Attributes:
        outliers: see `outliers`.
        ranges: see `token_ranges`.
    """

    outliers: dict[str, Json]
    ranges: dict[str, list[list[float]]]


class Session:
    """What the parts of an analysis share.

    Attributes:
        out: the run directory.
        request: what to measure.
        told: called with a line about every step.
        track: shows how far a loop has come.
        weights: which weights the results belong to.
    """

    def __init__(
        self, source: Source, request: Request, told: Told = lambda text: None, track: Track = untracked
    ) -> None:
        self.out, self.request, self.told, self.track = source.out, request, told, track
        self._load = source.load
        self.weights = Weights(
            lambda role: source.where(role, request.teacher),
            lambda role: (self.run if role == "student" else self.teacher).student,
        )

    def file(self, part: str) -> Path:
        """Where the result of a part is."""
        return self.out / ANALYSIS_FOLDER / f"{part}.json"

    def ledger(self, part: str) -> Ledger:
        """The intermediate results of a part, on these weights."""
        settings = {**self.request.settings(part), "models": self.weights.digests(part)}
        return Ledger(self.file(part).with_name(f".{part}.partial.json"), settings)

    @cached_property
    def run(self) -> Run:
        """The run, with its quantizers in place and calibrated; loaded when a part needs it.

        Raises:
            ConfigError: there are several processes.
        """
        run = self._load()
        if run.engine.world_size > 1:
            raise ConfigError(
                f"an analysis is the work of one process, and there are {run.engine.world_size}; start `qpipe analyze` "
                "by itself, not with torchrun or accelerate launch"
            )
        return run

    @cached_property
    def teacher(self) -> Run:
        """The full-precision model to compare with, in the place of the student; see `load_reference`."""
        return load_reference(self.run, self.request.teacher)

    @cached_property
    def pairing(self) -> Pairing:
        """Which of the teacher's layers the run's are compared with; see the function `pairing`."""
        found = pairing(self.run, self.teacher, self.request.layer_map)
        if found.states != tuple(range(len(self.teacher.instruments.map.blocks) + 1)):
            self.told(f"compared with the teacher's layers {', '.join(map(str, found.states[1:]))} ({found.why})")
        return found

    @cached_property
    def sample(self) -> list[Example]:
        """The first `request.sequences` validation examples."""
        return examples(self.run, self.request.sequences)

    def activations_as_they_are(self) -> AbstractContextManager[None]:
        """Within, weights are quantized and activations are not: a range that clips would hide what it clips."""
        return switched_off(self.run, [name for name in self.run.plan.sites if not name.endswith(":weight")])

    def looked_at(self) -> list[str]:
        """Names of the activation sites whose values outliers and ranges look at.

        Those of `request.sites`; else those that are quantized together with those that have a role in the model, since
        what hurts may lie where nothing is quantized; else all.

        Raises:
            SiteError: a pattern matches none.
        """
        run = self.run
        every = [name for name, site in run.instruments.sites.items() if site.slot in PER_TOKEN]
        if self.request.sites:
            return select(run, every, self.request.sites)
        known = {name for names in run.instruments.map.sites.values() for name in names}.union(run.plan.sites)
        return [name for name in every if name in known] or every

    @cached_property
    def looks(self) -> dict[str, Look]:
        """What these sites hold, by name; both summaries come from one pass, since their values are not kept."""
        tokens = [example.tokens for example in self.sample]
        return {name: Look(outliers(seen, tokens), token_ranges(seen)) for name, seen in self.values()}

    def values(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Each of these sites with its values in the sample, no activation quantized; those of other forms left out.

        Yields:
            Name, and `[tokens, features]` for each example.

        Raises:
            SiteError: no site gives that.
        """
        lengths = [len(next(iter(example.batch.values()))[0]) for example in self.sample]
        names, fitting = self.looked_at(), 0
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            with self.activations_as_they_are():
                collected = collect(self.run, some, self.sample)
            for name in some:
                seen = collected.get(name, [])
                if all(v.ndim == 2 for v in seen) and _same_tokens(seen, self.sample, lengths):
                    fitting += 1
                    yield name, seen
        if not fitting:
            raise SiteError("no site gives [tokens, features]; choose others with --sites")


def _same_tokens(seen: Sequence[Any], sample: Sequence[Example], lengths: list[int]) -> bool:
    return len(seen) == len(sample) and (not sample[0].tokens or [len(v) for v in seen] == lengths)
