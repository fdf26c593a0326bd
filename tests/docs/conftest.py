"""A folder to run the documentation's code in, with a finished run at `runs/demo`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from working_model import working_model

PLANT = Path(__file__).resolve().parents[2] / "examples" / "activations" / "plant.py"


def planted_teacher(folder: Path, model: Path) -> None:
    """Write a model that works, and that one range per activation costs much: its last block has outliers."""
    spec = importlib.util.spec_from_file_location("plant", PLANT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
        spec.loader.exec_module(module)
    module.prepare(working_model(folder).parent, model, size=4000.0, dimensions=2)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run and a teacher, which stands in for `runs/demo`."""
    import qpipe
    from qpipe.testing import tiny_config

    folder = tmp_path_factory.mktemp("demo")
    run = qpipe.execute(tiny_config(folder))
    assert run.results["verified"]
    planted_teacher(tmp_path_factory.mktemp("teacher"), folder / "run" / "teacher" / "model")
    return folder / "run"


@pytest.fixture
def workplace(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working directory that holds a copy of the finished run at `runs/demo`."""
    shutil.copytree(demo_run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path
