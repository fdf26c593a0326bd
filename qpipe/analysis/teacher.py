"""The full-precision model that a run is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qpipe.config import RunConfig
from qpipe.data.locate import locate
from qpipe.errors import ConfigError, ModelError
from qpipe.run import Run
from qpipe.stages.build import instrument, load_teacher
from qpipe.stages.execute import read_results


def reference_name(out: Path, config: RunConfig, trained: bool, given: str | None) -> str:
    """Where the full-precision model is.

    That is the one given; else the one that the run names or has fine-tuned as its teacher; else, where nothing was
    trained, the model that was quantized.

    Args:
        out: the run directory.
        config: of the run.
        trained: True if the run has ended, False for a model that is quantized for the analysis.
        given: the name that was asked for.

    Raises:
        ConfigError: there is none.
    """
    own = out / "teacher" / "model"
    if given is not None:
        path = Path(locate(given))
        return str(path / "model") if (path / "model" / "config.json").is_file() else str(path)
    if config.teacher.name is not None:
        return locate(config.teacher.name)
    if own.is_dir():
        return str(own)
    if not trained or read_results(out).get("steps") == 0:
        return locate(config.model.name)
    raise ConfigError(
        f"{out} was trained without a teacher; name the full-precision model to compare with: --teacher MODEL, a "
        "folder or hub name, or the run that made it"
    )


def load_reference(run: Run, given: str | None) -> Run:
    """A full-precision model of the same task in the place of the student, without quantizers.

    Args:
        run: what is compared with it.
        given: its name; None: see `reference_name`.

    Raises:
        ConfigError: there is none, or it reads other tokens.
        ModelError: it is no model that was fine-tuned for this task.
    """
    name = reference_name(run.out, run.config, run.trained, given)
    teacher = load_teacher(run, name).to(run.engine.device, run.engine.dtype)
    tokens = [getattr(model.config, "vocab_size", None) for model in (run.student, teacher)]
    if tokens[0] != tokens[1]:
        raise ConfigError(
            f"{name} has a vocabulary of {tokens[1]} tokens, and the quantized model one of {tokens[0]}; compare it "
            "with a model of the same tokenizer"
        )
    return replace(run, student=teacher, instruments=instrument(run.host, teacher), teacher=None)


def layer_map(run: Run, teacher: Run) -> list[int]:
    """For each block of the student the block of the teacher it stands for, both from 0: evenly spaced, the last last.

    Raises:
        ModelError: the student's depth does not divide the teacher's, or there are no blocks.
    """
    ours, theirs = len(run.instruments.map.blocks), len(teacher.instruments.map.blocks)
    if ours == 0 or theirs % ours:
        raise ModelError(
            f"the quantized model has {ours} blocks and its teacher {theirs}; layers are compared where the first "
            "number divides the second"
        )
    return [theirs // ours * (block + 1) - 1 for block in range(ours)]
