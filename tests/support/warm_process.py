"""Processes forked from one that has torch and transformers loaded, in place of new interpreters.

`qpipe.export.verify` reloads every export in a fresh process that cannot import qpipe. Hundreds of tests end there, and
nine tenths of such a process are imports. A child of this module's server has the same modules, and no qpipe, as a new
interpreter would have after its imports. Tests that start qpipe as a command verify with the real thing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "numpy",
    "safetensors.torch",
    "compressed_tensors",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.quantizers.auto",
)


def run_script(words: Sequence[str], cwd: str, environment: Mapping[str, str], errors: str) -> None:
    """In the child: run a script as `python` would."""
    with Path(errors).open("w") as file:
        os.dup2(file.fileno(), 2)
    if any(name.partition(".")[0] == "qpipe" for name in sys.modules):
        raise RuntimeError("qpipe is loaded in what stands for a fresh process")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


class WarmProcess:
    """Runs Python scripts in children of a server, with the interface of `subprocess.run`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def run(self, words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run(words, ...)` returns, where `words` are `python -P SCRIPT ...`; else just that."""
        if list(words[:2]) != [sys.executable, "-P"]:
            return subprocess.run(words, **options)
        errors = Path(options["cwd"]) / "stderr.txt"
        child = self._context.Process(
            target=run_script, args=(list(words[2:]), str(options["cwd"]), dict(options["env"]), str(errors))
        )
        child.start()
        child.join()
        assert child.exitcode is not None
        return subprocess.CompletedProcess(list(words), child.exitcode, "", errors.read_text())
