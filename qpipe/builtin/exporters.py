"""The file formats of the host. Their writers are imported when used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qpipe.plugin import Plugin, hookimpl
from qpipe.types import Exporter


def _write_compressed(record: Any, directory: Path) -> None:
    from qpipe.export import compressed

    compressed.write(record, directory)


def _check_compressed(sites: Any) -> Iterable[str]:
    from qpipe.export import compressed

    return compressed.check(sites)


def _bytes_compressed(name: str, weight: Any, dtype: Any) -> int:
    from qpipe.export import schemes

    return sum(tensor.nbytes for tensor in schemes.weight_tensors(name, weight, dtype)[1].values())


def _loading_compressed(model: Any, sites: Any, state: Mapping[str, Any]) -> str | None:
    from qpipe.export import loading

    return loading.loading_problem(model, sites, state)


def _write_native(record: Any, directory: Path) -> None:
    from qpipe.export import native

    native.write(record, directory)


def _check_native(sites: Any) -> Iterable[str]:
    from qpipe.export import native

    return native.check(sites)


def _bytes_native(name: str, weight: Any, dtype: Any) -> int:
    from qpipe.export import native

    return sum(tensor.nbytes for tensor in native.pack(name, weight)[1].values())


class Exporters(Plugin):
    """Offers `compressed-tensors` and `native`."""

    @hookimpl
    def qpipe_exporters(self) -> Iterable[Exporter]:
        """Both formats; each writes an `ExportRecord` and checks a list of `PlannedSite`."""
        yield Exporter(
            "compressed-tensors",
            _write_compressed,
            _check_compressed,
            "Linear and Embedding weights of 1 to 8 bits; loads in stock transformers",
            _bytes_compressed,
            loads_with_transformers=True,
            loading_problem=_loading_compressed,
        )
        yield Exporter(
            "native",
            _write_native,
            _check_native,
            "any module, packed embeddings, codes -1, 0, 1 at 1.6 bits; read by qpipe, or numpy (docs/format.md)",
            _bytes_native,
            loads_with_transformers=True,
        )
