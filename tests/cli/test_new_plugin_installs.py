"""`plugins new` in a fresh environment: installs, passes its tests, is listed."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import qpipe
from qpipe.cli import scaffold


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment that borrows the packages of this one, and a plugin rendered and installed into it."""
    folder = tmp_path_factory.mktemp("fresh")
    plugin = scaffold.render("my-penalty", folder)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    borrowed = [sysconfig.get_path("purelib"), str(Path(qpipe.__file__).parents[1])]
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*install, plugin], check=True)
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
