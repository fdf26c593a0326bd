"""The command line has to answer at once: what it imports is held here, how long it takes by benchmarks/startup.py."""

import json
import subprocess
import sys

import pytest

OWN = {"qpipe"}
TYPER = {"typer", "annotated_doc", "shellingham"}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["plugins", "list"], ["launch", "--help"]], ids=" ".join)
def test_imports_typer_and_nothing_else(args):
    code = (
        "import json, sys\n"
        "before = set(sys.modules)\n"  # what .pth files import into every process of this environment
        "from qpipe.cli import main\n"
        f"sys.argv = ['qpipe', *{args!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('MODULES', json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(result.stdout.rpartition("MODULES ")[2])
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert "typer" in packages
    assert packages <= OWN | TYPER
