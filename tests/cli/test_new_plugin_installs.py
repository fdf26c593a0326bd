"""`plugins new` in a fresh environment: installs, passes its tests, is listed."""

import json
import subprocess
import venv
from pathlib import Path

import pytest

import qpipe
from qpipe.cli import scaffold

ROOT = Path(qpipe.__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment with qpipe installed as a user would, and a plugin rendered and installed into it."""
    folder = tmp_path_factory.mktemp("fresh")
    plugin = scaffold.render("my-penalty", folder)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    for packages in (["torch"], [ROOT], ["pytest", plugin]):
        subprocess.run([*install, *packages], check=True)
    return python, plugin


def run(*command, cwd):
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_is_listed_and_loads(environment):
    python, plugin = environment
    listed = run(python, "-m", "qpipe.cli", "plugins", "list", "--json", cwd=plugin)
    assert "my-penalty" in [row["name"] for row in json.loads(listed.stdout)]
    shown = run(python, "-m", "qpipe.cli", "plugins", "show", "my-penalty", cwd=plugin)
    assert shown.returncode == 0 and "qpipe_weight_losses" in shown.stdout, shown.stderr


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["not contract", "contract"])
def test_its_own_tests_pass(environment, selection):
    python, plugin = environment
    result = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, "tests", cwd=plugin)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
