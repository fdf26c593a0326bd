"""The command line has to answer at once."""

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "numpy", "pydantic", "rich", "jinja2")
COMMANDS = (["--help"], ["plugins", "list"])


@pytest.mark.parametrize("args", [*COMMANDS, ["launch", "--help"], ["--version"]], ids=" ".join)
def test_imports_nothing_heavy(args):
    code = (
        "import sys\n"
        "from qpipe.cli import main\n"
        f"sys.argv = ['qpipe', *{args!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = result.stdout.rpartition("HEAVY ")[2].strip()
    allowed = "['pydantic']" if args == ["launch", "--help"] else "[]"  # typer 0.29 reads other options with it
    assert heavy in ("[]", allowed)


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_answers_nearly_as_fast_as_a_program_of_typer_can(args):
    """Less than 300 ms on the machines it was written on; how fast this one is does not matter."""

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, which other programs change less; both in turns, since the machine's speed changes too.
    pairs = [(seconds("-m", "qpipe.cli", *args), seconds("-c", "import typer.testing")) for _ in range(5)]
    own, least = (min(times) for times in zip(*pairs, strict=True))
    assert own < 2.2 * least, (own, least)
