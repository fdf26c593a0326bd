"""What a plugin is: an object made once per run from its options, with hook implementations as methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pluggy
from pydantic import BaseModel, ConfigDict

hookspec = pluggy.HookspecMarker("qpipe")
hookimpl = pluggy.HookimplMarker("qpipe")


class Options(BaseModel):
    """Base of every options model. Unknown keys are refused and values cannot change during a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """Base class of plugins.

    A distribution offers one under the entry-point group `qpipe`; the entry point's name is what users write in
    `--plugins`. Subclass, declare `Options`, and decorate hook implementations with `@qpipe.hookimpl`. An
    implementation may take any subset of the arguments that `qpipe.hookspecs` documents for its hook.
    """

    Options: ClassVar[type[Options]] = Options
    needs_teacher: bool = False
    """True if the plugin reads teacher signals; the run then loads, or first fine-tunes, a teacher."""

    layer_map: Sequence[int] | None = None
    """Which of the teacher's layers, from 1, each layer of the student learns from; with one number more, first, the
    teacher's hidden state for what the student's first block receives. None: no such map. `qpipe analyze` compares
    layers by it."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()
