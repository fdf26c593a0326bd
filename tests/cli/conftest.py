"""Running the command line in this process or in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
ENV.pop("QPIPE_TRACEBACK", None)

CONFIG = """
model: {name: some/model}
train: {learning_rate: 1e-4}
"""


@dataclass
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("launch", "--dry-run")` runs `main` here, which is fast once torch is imported."""
    monkeypatch.delenv("QPIPE_TRACEBACK", raising=False)

    def call(*args: Any) -> Result:
        from qpipe.cli import main

        monkeypatch.setattr(sys, "argv", ["qpipe", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def fake_stages(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """`fake_stages(body)` gives the environment of processes in which `qpipe.stages.execute` has that body.

    These tests are about processes and not about training, so that the workers need not import torch.
    """

    def make(body: str) -> dict[str, str]:
        folder = tmp_path / "fakes"
        folder.mkdir()
        indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
        (folder / "sitecustomize.py").write_text(
            "import os, signal, sys, time, types\n"
            "from pathlib import Path\n"
            "stages = types.ModuleType('qpipe.stages')\n"
            "def execute(config, resume=False):\n"
            "    rank, out = int(os.environ['RANK']), Path(config.out)\n"
            f"{indented}\n"
            "stages.execute = execute\n"
            "sys.modules['qpipe.stages'] = stages\n"
        )
        return {**ENV, "PYTHONPATH": str(folder)}

    return make


@pytest.fixture
def installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed_plugin("name", "module:Class", code)` puts a distribution with that plugin on the path."""

    def install(name: str, target: str, code: str, distribution: str | None = None) -> None:
        site = tmp_path / f"site-{distribution or name}"
        distribution = distribution or f"qpipe-{name}"
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[qpipe]\n{name} = {target}\n")
        (site / f"{target.partition(':')[0]}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    return install


def run(*args: Any, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m qpipe.cli` in a process of its own."""
    command = [sys.executable, "-m", "qpipe.cli", *map(str, args)]
    return subprocess.run(command, env=env or ENV, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run
