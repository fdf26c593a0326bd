"""Proof that a packed checkpoint is the trained model: files, weights, logits, metric."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpipe.errors import FormatError, QpipeError
from qpipe.export.companions import environment
from qpipe.export.folder import METADATA, PROGRAM, PROGRAM_LAYOUT, REFERENCE, check_sums, read_json
from qpipe.export.metric import Prepared, compare_metrics, prepare

Status = Literal["pass", "fail", "skip"]

ROUNDING: Mapping[str, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of logits between machines, relative to the largest logit: some hundred units of rounding."""

ACTIVATION_ROUNDING = 5e-2
"""Added where activations are quantized: a last-bit difference can move a value to the next of 255 levels."""


@dataclass(frozen=True)
class Check:
    """One line of a verification.

    Attributes:
        name: what was checked: `files`, `weights`, `activations`, `logits`, `metric` or `program`.
        status: `pass`, `fail`, or `skip` if it could not be checked.
        detail: what was compared and found.
    """

    name: str
    status: Status
    detail: str


@dataclass
class VerifyResult:
    """Outcome for one checkpoint; `metrics` are those of the reloaded model, empty if the data could not be had."""

    directory: Path
    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if nothing failed and the weights were compared."""
        weights_checked = any(c.name == "weights" and c.status == "pass" for c in self.checks)
        return weights_checked and all(c.status != "fail" for c in self.checks)

    def add(self, name: str, status: Status, detail: str) -> None:
        """Append a check."""
        self.checks.append(Check(name, status, detail))

    def lines(self) -> list[str]:
        """The outcome for people, one line per check and a last one for all."""
        words = {"pass": "ok", "fail": "FAILED", "skip": "not checked"}
        lines = [f"{c.name}: {words[c.status]}: {c.detail}" for c in self.checks]
        return [*lines, f"{self.directory}: {'verified' if self.passed else 'NOT VERIFIED'}"]


@dataclass(frozen=True)
class _Case:
    directory: Path
    about: dict[str, Any]
    result: VerifyResult
    prepared: Prepared
    outputs: Path
    trusted: bool
    runs_program: bool

    @property
    def program_outputs(self) -> Path:
        """What the program computes."""
        return self.outputs.with_name("program.safetensors")


def verify(
    directory: Path | str,
    check_metric: bool = True,
    trust_remote_code: bool = False,
    run_program: bool | None = None,
) -> VerifyResult:
    """Check one checkpoint; see `verify_all`."""
    return verify_all([directory], check_metric, trust_remote_code, run_program)[0]


def verify_all(
    directories: Sequence[Path | str],
    check_metric: bool = True,
    trust_remote_code: bool = False,
    run_program: bool | None = None,
) -> list[VerifyResult]:
    """Check packed checkpoints in one fresh process in which qpipe cannot be imported.

    Compared are the checksums of all files; every decoded weight and every other tensor, whose difference must be
    exactly 0; likewise the ranges of activations in compressed-tensors; the logits of the reference examples, exactly
    in an unchanged environment, else within `ROUNDING`; and the metrics, if the data of the run can be loaded. Of
    native checkpoints with quantized activations, which no other program computes, logits and metrics come from a plain
    model in this process, whose activations qpipe quantizes. Where a program lies beside the weights, its tensors are
    compared too, and its logits and metrics within rounding, since it forms sums in another order.

    Args:
        directories: packed checkpoints.
        check_metric: False leaves the metric out, which needs the data.
        trust_remote_code: let a checkpoint run Python code that lies in it; without that, one that needs it fails.
        run_program: run programs, which can do anything that code can; None: if code is trusted. Others are skipped.
    """
    run_program = trust_remote_code if run_program is None else run_program
    results = [VerifyResult(Path(d)) for d in directories]
    with tempfile.TemporaryDirectory(prefix="qpipe-verify-") as scratch:
        cases = []
        for number, result in enumerate(results):
            about = _files(result)
            if about is not None:
                folder = Path(scratch) / str(number)
                folder.mkdir()
                prepared = _metric_source(result.directory, about, folder, check_metric, trust_remote_code)
                outputs = folder / "outputs.safetensors"
                runs = run_program and "program" in about
                home = result.directory.resolve()
                cases.append(_Case(home, about, result, prepared, outputs, trust_remote_code, runs))
        programs = [case for case in cases if case.runs_program]
        jobs = [*map(_job, cases), *map(_program_job, programs)]
        found = _run(jobs, Path(scratch))
        for case, finding in zip(cases, found[: len(cases)], strict=True):
            _judge(case, finding)
        for case, finding in zip(programs, found[len(cases) :], strict=True):
            _judge_program(case, finding)
    return results


def _files(result: VerifyResult) -> dict[str, Any] | None:
    """Check the files; the metadata, or None if there is no point in going on."""
    try:
        problems = check_sums(result.directory)
        about = read_json(result.directory / METADATA) if not problems else {}
        if not problems:
            for key in ("format", "auto_class", "dtype", "weights", "tensors", "environment"):
                if key not in about:
                    raise FormatError(f"{result.directory / METADATA} lacks {key!r}")
            load_file(result.directory / REFERENCE)
    except (FormatError, SafetensorError, OSError) as error:
        result.add("files", "fail", str(error))
        return None
    for problem in problems:
        result.add("files", "fail", problem)
    if problems:
        return None
    result.add("files", "pass", "every file has the checksum in SHA256SUMS")
    return about


def _runs_without_qpipe(about: Mapping[str, Any]) -> bool:
    """False for native checkpoints with quantized activations, whose arithmetic no other program has."""
    return about["format"] != "native" or not about["activations"]


def _metric_source(directory: Path, about: Mapping[str, Any], folder: Path, wanted: bool, trusted: bool) -> Prepared:
    if not wanted:
        return Prepared(reason="not asked for")
    names = read_json(directory / "config.json").get("id2label") or {}
    return prepare(about, folder / "batches", trusted, tuple(names[key] for key in sorted(names, key=int)))


def _job(case: _Case) -> dict[str, Any]:
    about = case.about
    return {
        "directory": str(case.directory),
        "format": about["format"],
        "auto_class": about["auto_class"],
        "attention": about.get("attention"),
        "trust_remote_code": case.trusted,
        "plain": _runs_without_qpipe(about),
        "num_threads": about["environment"].get("num_threads"),
        "reference": REFERENCE,
        "names": [*about["weights"], *about["tensors"]],
        "kind": case.prepared.kind,
        "batches": str(case.prepared.batches) if case.prepared.batches else None,
        "outputs": str(case.outputs),
    }


def _program_job(case: _Case) -> dict[str, Any]:
    named = {"program": PROGRAM, "program_layout": PROGRAM_LAYOUT}
    return {**_job(case), **named, "format": "program", "outputs": str(case.program_outputs)}


def _run(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    if not jobs:
        return []
    job_file, result_file = scratch / "jobs.json", scratch / "results.json"
    job_file.write_text(json.dumps(jobs))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    script = Path(__file__).with_name("_fresh.py")
    # -P keeps the script's own folder, a part of qpipe, off the import path.
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(job_file), str(result_file)],
        cwd=scratch,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not result_file.is_file():
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        return [{"error": f"the fresh process ended with status {done.returncode}: {tail}"}] * len(jobs)
    found: list[dict[str, Any]] = json.loads(result_file.read_text())
    return found


def _judge(case: _Case, found: Mapping[str, Any]) -> None:
    result, about = case.result, case.about
    if "error" in found:
        advice = "; read that code, then: qpipe verify --trust-remote-code" if needs_trust(case, found["error"]) else ""
        result.add("weights", "fail", f"loading without qpipe failed: {found['error']}{advice}")
        return
    expected = {**about["weights"], **about["tensors"]}
    wrong = [n for n, entry in expected.items() if found["hashes"].get(n) != entry["sha256"]]
    for problem in found["problems"]:
        result.add("weights", "fail", f"loading left {problem}")
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        result.add("weights", "fail", f"{len(wrong)} of {len(expected)} tensors differ from those trained: {shown}")
    elif not found["problems"]:
        count = len(about["weights"])
        result.add(
            "weights", "pass", f"{count} quantized and {len(about['tensors'])} other tensors, difference exactly 0"
        )
    if about["format"] == "compressed-tensors":
        differing = differing_ranges(about["activations"], found["ranges"])
        count = len(about["activations"])
        if differing:
            result.add("activations", "fail", f"{len(differing)} of {count} ranges differ: {'; '.join(differing[:3])}")
        elif count:
            result.add("activations", "pass", f"{count} ranges, difference exactly 0")
    try:
        outputs = _outputs(case)
    except QpipeError as error:
        result.add("logits", "fail", f"the checkpoint cannot be run: {error}")
        return
    status, detail = compare_logits(case.about, load_file(case.directory / REFERENCE)["logits"], outputs["logits"])
    result.add("logits", status, detail)
    if case.prepared.batches is None:
        result.add("metric", "skip", case.prepared.reason)
    else:
        ok, detail, result.metrics = compare_metrics(
            about, case.prepared, outputs["predictions"], outputs["references"], bool(changed_environment(about))
        )
        result.add("metric", "pass" if ok else "fail", detail)
    if "program" in about and not case.runs_program:
        result.add(
            "program",
            "skip",
            f"{PROGRAM} can do what any code can, so it only runs if you trust whom it comes from: "
            "qpipe verify --trust-remote-code",
        )


def differing_ranges(expected: Iterable[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In words, where the activations of a loaded model are quantized otherwise than recorded.

    Args:
        expected: `activations` of `qpipe.json`.
        found: by `module:slot`, the same keys.
    """
    recorded = {f"{entry['module']}:{entry['slot']}": entry for entry in expected}
    differing = [f"{site} is quantized, and was not" for site in sorted(found.keys() - recorded.keys())]
    for site, entry in recorded.items():
        if site not in found:
            differing.append(f"{site} is not quantized")
            continue
        wanted = {key: entry[key] for key in found[site]}
        if not entry["dynamic"]:
            wanted["zero_point"] = float(entry["zero_point"] or 0)
        wrong = [key for key, value in found[site].items() if value != wanted[key]]
        differing += [f"{site} has {key} {found[site][key]} instead of {wanted[key]}" for key in wrong]
    return differing


def _judge_program(case: _Case, found: Mapping[str, Any]) -> None:
    """Compare a program with its layout, and what it computes with the run."""
    if "error" in found:
        case.result.add("program", "fail", f"running it without qpipe failed: {found['error']}")
        return
    layout = read_json(case.directory / PROGRAM_LAYOUT)
    expected = {**layout["weights"], **layout["tensors"]}
    wrong = [name for name, entry in expected.items() if found["hashes"].get(name) != entry["sha256"]]
    if wrong:
        case.result.add("program", "fail", f"{len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong[:3])}")
        return
    outputs = load_file(case.program_outputs)
    logits = load_file(case.directory / REFERENCE)["logits"]
    ok, detail = compare_rounded(case.about, logits, outputs["logits"], "sums are formed in another order")
    parts = [f"{len(expected)} tensors, difference exactly 0", detail]
    if case.prepared.batches is not None:
        agrees, detail, _ = compare_metrics(
            case.about, case.prepared, outputs["predictions"], outputs["references"], rounded=True
        )
        ok = ok and agrees
        parts.append(detail)
    case.result.add("program", "pass" if ok else "fail", "; ".join(parts))


def needs_trust(case: _Case, error: str) -> bool:
    """True if transformers refused to run the code of a checkpoint that nobody has said to trust."""
    return not case.trusted and "trust_remote_code" in error


def _outputs(case: _Case) -> dict[str, Tensor]:
    """Logits of the reference, and predictions where there are batches: of the fresh process, or of qpipe itself."""
    if _runs_without_qpipe(case.about):
        return load_file(case.outputs)
    return native_outputs(case.directory, case.about, case.prepared, case.trusted)


def native_outputs(
    directory: Path, about: Mapping[str, Any], prepared: Prepared, trusted: bool = False
) -> dict[str, Tensor]:
    """What a native checkpoint computes: decoded weights in the plain model, activations quantized by qpipe.

    Returns:
        `logits` of the reference; `predictions` and `references` where there are batches.
    """
    from qpipe.export._fresh import outputs_of
    from qpipe.export.activations import quantize_activations
    from qpipe.export.native import load_native
    from qpipe.host import installed, load_plugins

    threads = torch.get_num_threads()
    torch.set_num_threads(about["environment"].get("num_threads") or threads)
    try:
        model: Any = load_native(directory, about.get("attention"), trusted)
        known = {n: options for n, options in _plugins(about).items() if n in installed()}
        quantize_activations(model, about["activations"], load_plugins(known))
        batches = str(prepared.batches) if prepared.batches else None
        return outputs_of(model, str(directory / REFERENCE), batches, prepared.kind)
    finally:
        torch.set_num_threads(threads)


def _plugins(about: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Options of the run's plugins by name, as recorded."""
    found: Mapping[str, Mapping[str, Any]] = (about.get("config") or {}).get("plugins") or {}
    return found


def changed_environment(about: Mapping[str, Any]) -> list[str]:
    """What differs between the recorded environment and this one, such as `torch 2.12.0 -> 2.13.0`."""
    recorded = about["environment"]
    now = {"device": "cpu", **environment(getattr(torch, about["dtype"])), "num_threads": recorded.get("num_threads")}
    return [f"{key} {value} -> {now.get(key)}" for key, value in recorded.items() if now.get(key) != value]


def compare_logits(about: Mapping[str, Any], expected: Tensor, found: Tensor) -> tuple[Status, str]:
    """Compare logits `[examples, ...]` exactly, or within rounding where the environment changed."""
    examples = f"{len(expected)} reference examples"
    if torch.equal(expected.double(), found.double()):
        return "pass", f"{examples}, difference exactly 0"
    changes = changed_environment(about)
    ok, detail = compare_rounded(about, expected, found, f"the environment changed: {'; '.join(changes)}")
    if not changes:
        return "fail", f"{detail.partition(', allowed')[0]} in the environment of the export, expected 0"
    return "pass" if ok else "fail", detail


def compare_rounded(about: Mapping[str, Any], expected: Tensor, found: Tensor, why: str) -> tuple[bool, str]:
    """Compare logits `[examples, ...]` within rounding, which `why` gives a reason for: `(agrees, detail)`."""
    if expected.shape != found.shape:
        return False, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    difference = (expected.double() - found.double()).abs().max().item()
    relative = ROUNDING[about["dtype"]] + (ACTIVATION_ROUNDING if about["activations"] else 0.0)
    bound = relative * max(1.0, expected.double().abs().max().item())
    return difference <= bound, (  # a NaN compares false and fails
        f"{len(expected)} reference examples, largest difference {difference:.3g}, allowed {bound:.3g} for rounding in "
        f"{about['dtype']} because {why}"
    )
