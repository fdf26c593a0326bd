"""Analyze: run the parts that are asked for, keep each result as soon as it is there, and go on where it was left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qpipe.analysis.parts import PARTS
from qpipe.analysis.request import NEEDS_TEACHER, Request
from qpipe.analysis.session import Session, Source, Told, Track, untracked
from qpipe.analysis.weights import roles
from qpipe.files import write_json
from qpipe.report.inputs import ANALYSIS_FOLDER, COMPARED_FILE, read_json
from qpipe.run import Run
from qpipe.types import Json

__all__ = ["Request", "analyze", "analyze_runs", "measure"]


def analyze(
    run: Run, request: Request, again: bool = False, told: Told = lambda text: None, track: Track = untracked
) -> dict[str, Json]:
    """Measure what is asked for, and write `analysis/PART.json` into the run directory after each part.

    Args:
        run: a run on one process with its quantizers in place, and calibrated.
        request: what to measure.
        again: measure parts anew that were measured before with the same settings on the same weights.
        told: called with a line about every step.
        track: shows how far a loop has come.

    Returns:
        The results by part.

    Raises:
        ConfigError: a part does not fit the run.
        SiteError: a pattern matches no site.
    """
    return measure(Session(Source(run.out, lambda: run), request, told, track), again)


def measure(session: Session, again: bool = False) -> dict[str, Json]:
    """`analyze` for a run that is loaded only if a part needs it."""
    found = {}
    before = {part: None if again else _kept(session, part) for part in session.request.parts}
    if any(before[part] is None for part in before if part in NEEDS_TEACHER):
        _ = session.pairing  # what is wrong with the teacher or the map shows before long work
    for part, value in before.items():
        if value is not None:
            session.told(f"{part}: measured before")
            found[part] = value
            continue
        session.told(f"{part}:")
        if again:
            session.ledger(part).close()
        models = session.weights.marks(part)  # of what is measured, whatever lies there when that has ended
        found[part] = {"settings": session.request.settings(part), "models": models, **PARTS[part](session)}
        session.file(part).parent.mkdir(parents=True, exist_ok=True)
        write_json(session.file(part), found[part])
    return found


def _kept(session: Session, part: str) -> dict[str, Json] | None:
    """What was measured before with these settings and on these weights; curves may have grown."""
    before: dict[str, Json] | None = read_json(session.file(part))
    if before is None or part == "curves" or before["settings"] != session.request.settings(part):
        return None
    carried = before.get("models", {})
    marks = {role: session.weights.matching(role, carried.get(role)) for role in roles(part)}
    other = [role for role, mark in marks.items() if mark is None]
    if other:
        known = f"with another {' and another '.join(other)}" if carried else "and not noted on which weights"
        session.told(f"{part}: measured before {known}")
        return None
    if marks != carried:  # the same weights in other files, which need not be read next time
        before = {**before, "models": marks}
        write_json(session.file(part), before)
    return before


def analyze_runs(
    sources: Sequence[Source],
    request: Request,
    again: bool = False,
    told: Told = lambda text: None,
    track: Track = untracked,
) -> dict[str, dict[str, Json]]:
    """`analyze` several runs, one after another; each remembers the others for its report.

    Args:
        sources: the runs.
        request: as for `analyze`, as are the other arguments.

    Returns:
        The results by run directory.
    """
    found = {}
    outs = [source.out for source in sources]
    for source in sources:
        if len(sources) > 1:
            told(f"{source.out}:")
        found[str(source.out)] = measure(Session(source, request, told, track), again)
    if len(sources) > 1:
        for out in outs:
            remember(out, [other for other in outs if other != out], request.parts)
    return found


def remember(out: Path, others: Sequence[Path], parts: Sequence[str]) -> None:
    """Note in a run which others these parts of it are compared with; other parts stay as an earlier call left them."""
    file = out / ANALYSIS_FOLDER / COMPARED_FILE
    runs = [str(other.resolve()) for other in others]
    write_json(file, {**(read_json(file) or {}), **dict.fromkeys(parts, runs)})
