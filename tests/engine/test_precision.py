"""`engine.precision: auto` takes bfloat16 where the processor is faster in it."""

import pytest
import torch

from qpipe.config import EngineConfig
from qpipe.engine.base import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "AMD EPYC 9R45", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC 7R13", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_follows_the_processor(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision(EngineConfig(), CPU) == expected
    for name in ("float32", "bfloat16"):
        assert resolve_precision(EngineConfig(precision=name), CPU) == getattr(torch, name), (
            "what is asked for is taken"
        )
