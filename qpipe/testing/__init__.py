"""For authors of plugins: tiny models and data, distributed runs, and the contract every plugin keeps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "check_plugin": "qpipe.testing.contract",
    "check_quantizer": "qpipe.testing.quantizers",
    "check_rules": "qpipe.testing.contract",
    "tiny_model": "qpipe.testing.tiny",
    "tiny_text_data": "qpipe.testing.tiny",
    "tiny_config": "qpipe.testing.tiny",
    "run_distributed": "qpipe.testing.distributed",
}
__all__ = [
    "check_plugin",
    "check_quantizer",
    "check_rules",
    "run_distributed",
    "tiny_config",
    "tiny_model",
    "tiny_text_data",
]

if TYPE_CHECKING:
    from qpipe.testing.contract import check_plugin, check_rules
    from qpipe.testing.distributed import run_distributed
    from qpipe.testing.quantizers import check_quantizer
    from qpipe.testing.tiny import tiny_config, tiny_model, tiny_text_data


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qpipe.testing' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
