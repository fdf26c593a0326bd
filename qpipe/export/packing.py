"""Dense packing of small integers into bytes, row by row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qpipe.errors import FormatError

TRITS_PER_BYTE = 5
"""3**5 = 243 values fit a byte: 1.6 bits per three-valued weight."""

_POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack_bits(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Pack signed codes `[rows, n]` into bytes `[rows, ceil(n * bits / 8)]`.

    A code is stored as `code + 2**(bits - 1)`; number i of a row lies in bits `[i * bits, (i + 1) * bits)` of that
    row's bytes, least significant bit first. Rows are padded to a byte with zeros.

    Raises:
        FormatError: `bits` is not in 1..8, or a code is outside `[-2**(bits-1), 2**(bits-1) - 1]`.
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"codes of {bits} bits cannot be packed; allowed: 1 to 8")
    unsigned = codes.astype(np.int16) + (1 << (bits - 1))
    if unsigned.size and (unsigned.min() < 0 or unsigned.max() >= 1 << bits):
        raise FormatError(f"codes in [{codes.min()}, {codes.max()}] do not fit {bits} bits")
    planes = np.unpackbits(unsigned.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(codes.shape[0], -1), axis=-1, bitorder="little")


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int16]:
    """Undo `pack_bits`: bytes `[rows, ceil(count * bits / 8)]` to codes `[rows, count]`."""
    planes = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    values = np.packbits(planes, axis=-1, bitorder="little")[..., 0].astype(np.int16)
    return values - (1 << (bits - 1))


def pack_trits(codes: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Pack codes -1, 0, 1 `[rows, n]` into bytes `[rows, ceil(n / 5)]`: `sum((code_i + 1) * 3**i)` over five codes.

    Raises:
        FormatError: a code is not -1, 0 or 1.
    """
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise FormatError(f"codes in [{codes.min()}, {codes.max()}] are not all of -1, 0, 1; use the packer `bits`")
    rows, count = codes.shape
    width = -(-count // TRITS_PER_BYTE)
    digits = np.zeros((rows, width * TRITS_PER_BYTE), dtype=np.uint8)
    digits[:, :count] = codes + 1
    return (digits.reshape(rows, width, TRITS_PER_BYTE) * _POWERS).sum(-1, dtype=np.uint8)


def unpack_trits(packed: NDArray[np.uint8], count: int) -> NDArray[np.int16]:
    """Undo `pack_trits`: bytes `[rows, ceil(count / 5)]` to codes `[rows, count]`."""
    digits = (packed[..., None] // _POWERS) % 3
    return digits.reshape(len(packed), -1)[:, :count].astype(np.int16) - 1


def packed_width(packer: str, bits: int, count: int) -> int:
    """Bytes of a row of `count` codes.

    Raises:
        FormatError: the packer is unknown.
    """
    if packer == "bits":
        return -(-count * bits // 8)
    if packer == "trits":
        return -(-count // TRITS_PER_BYTE)
    raise FormatError(f"unknown packer {packer!r}; known: bits, trits")
