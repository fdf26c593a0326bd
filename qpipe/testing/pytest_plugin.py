"""Fixtures for tests of plugins. Loaded by pytest through an entry point; imports nothing heavy until used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qpipe.config import RunConfig


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A folder with a two-layer BERT classifier of width 32 and its tokenizer."""
    from qpipe.testing.tiny import tiny_model

    return tiny_model(tmp_path / "tiny-bert", "bert")


@pytest.fixture
def tiny_run(tmp_path: Path) -> RunConfig:
    """The configuration of a run of a few seconds: tiny BERT, made-up sentences, one CPU process."""
    from qpipe.testing.tiny import tiny_config

    return tiny_config(tmp_path)
