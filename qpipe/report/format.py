"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "–"  # noqa: RUF001 (an en dash is what tables use)


def decimal(value: float | None, digits: int = 4) -> str:
    """Fixed decimals; a dash for None. Very large and very small values in scientific form."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def plain(value: float | None) -> str:
    """Shortest form, such as `4` or `1.58`."""
    return MISSING if value is None else f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes in decimal units: `22.7 MB`."""
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
