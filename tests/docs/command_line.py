"""What a forked process calls in place of a new `qpipe`; see `test_code_blocks.run_line`."""

import sys


def main(words: list[str]) -> None:
    """Run `qpipe WORDS`.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    from qpipe.cli import main as qpipe

    sys.argv = ["qpipe", *words]
    try:
        qpipe()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"qpipe ended with status {stop.code}") from None
