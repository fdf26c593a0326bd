"""The full-precision model that a run is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from qpipe.config import ModelConfig, RunConfig
from qpipe.data.locate import locate
from qpipe.errors import ConfigError, ModelError
from qpipe.model.reduce import chosen_layers
from qpipe.run import Run
from qpipe.stages.build import instrument, load_teacher
from qpipe.stages.casting import cast
from qpipe.stages.trained import has_learned


def reference_model(out: Path, config: RunConfig, trained: bool, given: str | None) -> ModelConfig:
    """What the full-precision model is.

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

    def named(name: str) -> ModelConfig:
        return ModelConfig(name=name, trust_remote_code=config.model.trust_remote_code)

    if given is not None:
        path = Path(locate(given))
        return named(str(path / "model") if (path / "model" / "config.json").is_file() else str(path))
    if config.teacher.name is not None:
        return named(locate(config.teacher.name))
    if own.is_dir():
        return named(str(own))
    if not has_learned(out, trained):
        as_it_was = {"name": locate(config.model.name), "keep_layers": None, "weights": "pretrained"}
        return config.model.model_copy(update=as_it_was)
    raise ConfigError(
        f"{out} was trained without a teacher; name the full-precision model to compare with: --teacher MODEL, a "
        "folder or hub name, or the run that made it"
    )


def load_reference(run: Run, given: str | None) -> Run:
    """A full-precision model of the same task in the place of the student, without quantizers.

    Args:
        run: what is compared with it.
        given: its name; None: see `reference_model`.

    Raises:
        ConfigError: there is none, or it reads other tokens.
        ModelError: it is no model that was fine-tuned for this task.
    """
    model = reference_model(run.out, run.config, run.trained, given)
    teacher = load_teacher(run, model, strict=True)
    cast(teacher, run)
    tokens = [getattr(model.config, "vocab_size", None) for model in (run.student, teacher)]
    if tokens[0] != tokens[1]:
        raise ConfigError(
            f"{model.name} has a vocabulary of {tokens[1]} tokens, and the quantized model one of {tokens[0]}; compare "
            "it with a model of the same tokenizer"
        )
    return replace(run, student=teacher, instruments=instrument(run.host, teacher), teacher=None)


@dataclass(frozen=True)
class Pairing:
    """Which tensors of the teacher those of the student are compared with.

    Attributes:
        states: the teacher's hidden state (0: what its first block receives) for what the student's first block
            receives, and then for what each of its blocks returns.
        why: what says so, as text.
    """

    states: tuple[int, ...]
    why: str

    @property
    def blocks(self) -> list[int]:
        """The teacher's block, from 0, for each of the student's."""
        return [state - 1 for state in self.states[1:]]


def pairing(run: Run, teacher: Run, given: Sequence[int] | None) -> Pairing:
    """Pair the student's layers with the teacher's.

    The first of these that fits both models decides: the map that was asked for; equal depth; the maps by which
    plugins of the run learned; the layers that the student kept; layers spaced evenly, the last with the last.

    Args:
        run: what is compared.
        teacher: see `Session.teacher`.
        given: the map that was asked for, as `Request.layer_map`.

    Raises:
        ConfigError: that map does not fit, or plugins have different ones.
        ModelError: nothing fits, or there are no blocks.
    """
    ours, theirs = len(run.instruments.map.blocks), len(teacher.instruments.map.blocks)
    if given is not None:
        states = _states(given, ours, theirs)
        if states is None:
            raise ConfigError(
                f"--layer-map {','.join(map(str, given))} must have {ours} rising numbers from 1 to the teacher's "
                f"{theirs}, one for each layer of the model, or one more, first, for what its first block receives"
            )
        return Pairing(states, "as asked")
    if 0 < ours == theirs:
        return Pairing(tuple(range(ours + 1)), "layer by layer")
    found = _learned(run, ours, theirs) or _kept(run, ours, theirs)
    if found is not None:
        return found
    if ours == 0 or theirs % ours:
        raise ModelError(
            f"the quantized model has {ours} blocks and its teacher {theirs}, which cannot be spaced evenly; say which "
            "of the teacher's layers to compare with: --layer-map 2,4,... with a number for each layer of the model"
        )
    return Pairing(tuple(range(0, theirs + 1, theirs // ours)), "spaced evenly")


def _states(layers: Sequence[int], ours: int, theirs: int) -> tuple[int, ...] | None:
    """Hidden states by a map of layers; None if it does not fit."""
    states = (0, *layers) if len(layers) == ours else tuple(layers)
    fits = len(states) == ours + 1 and states[0] >= 0 and states[-1] <= theirs
    return states if fits and all(below < above for below, above in pairwise(states)) else None


def _learned(run: Run, ours: int, theirs: int) -> Pairing | None:
    """The map by which plugins learned, if it fits; with another teacher it need not."""
    maps = {name: plugin.layer_map for name, plugin in run.host.plugins.items() if plugin.layer_map is not None}
    found = {name: states for name, layers in maps.items() if (states := _states(layers, ours, theirs)) is not None}
    if not found:
        return None
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"plugins {' and '.join(found)} map layers in two ways; say which with --layer-map, a number for each of "
            f"the model's {ours} layers"
        )
    return Pairing(next(iter(found.values())), f"the layer map of {' and '.join(found)}")


def _kept(run: Run, ours: int, theirs: int) -> Pairing | None:
    """The layers that `model.keep_layers` has kept, if the teacher can be what they were taken from."""
    wanted = run.config.model.keep_layers
    try:
        layers = [] if wanted is None else chosen_layers(wanted, theirs)
    except ConfigError:
        return None
    return (
        Pairing((0, *(layer + 1 for layer in layers)), "model.keep_layers") if layers and len(layers) == ours else None
    )
