"""What the process without qpipe does to a checkpoint."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from qpipe.export._fresh import read_weight
from qpipe.export.packing import pack_bits, pack_trits

ROWS, COLUMNS = 512, 2048


@pytest.mark.parametrize("bits", [1, 3, 8, "trits"])
def test_reading_a_packed_weight_takes_little_more_room_than_the_weight(bits, tmp_path):
    """Embeddings have a hundred million weights and more: what their bits take apart would not fit into memory."""
    source = np.random.default_rng(0)
    low, high = (-1, 1) if bits == "trits" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = source.integers(low, high + 1, (ROWS, COLUMNS)).astype(np.int8)
    packed = pack_trits(codes) if bits == "trits" else pack_bits(codes, bits)
    scale = source.random((ROWS, 1)).astype(np.float32)
    save_file({"w": packed.reshape(-1), "w_scale": scale}, tmp_path / "model.safetensors")
    packer = "trits" if bits == "trits" else "bits"
    layout = {"weights": {"w": {"packer": packer, "bits": 2 if bits == "trits" else bits, "shape": [ROWS, COLUMNS]}}}
    tracemalloc.start()
    found = read_weight(tmp_path, "w", layout, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, codes.astype(np.float32) * scale)
    assert peak < 20 * codes.size, f"{peak / codes.size:.1f} bytes per weight"
