"""A folder to run the documentation's code in, with a finished run at `runs/demo`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run, which stands in for `runs/demo`."""
    import qpipe
    from qpipe.testing import tiny_config

    folder = tmp_path_factory.mktemp("demo")
    run = qpipe.execute(tiny_config(folder))
    assert run.results["verified"]
    return folder / "run"


@pytest.fixture
def workplace(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working directory that holds a copy of the finished run at `runs/demo`."""
    shutil.copytree(demo_run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path
