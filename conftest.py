"""For all tests, of core and plugins: exports are verified in processes forked from one with its imports done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "tests" / "support"))


@pytest.fixture(scope="session", autouse=True)
def warm_verification() -> Iterator[None]:
    """See `tests/support/warm_process.py`."""
    import warm_process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpipe.export.verify.subprocess", warm_process.WarmProcess())
        yield
