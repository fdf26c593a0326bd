"""One thread and no network for every test; fixtures of several folders."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture
def quantized_sites(monkeypatch):
    """Sites at which `uniform-activation` quantized, one entry for each time that it had to."""
    from qpipe.quant.activation import UniformActivation

    calls: list[str] = []
    plain = UniformActivation.quantize_within

    def counting(self, value, ends=None):
        calls.append(self.site)
        return plain(self, value, ends)

    monkeypatch.setattr(UniformActivation, "quantize_within", counting)
    return calls
