"""Compiled quantization: the same bits as eager mode, and eager mode wherever it cannot be had."""

import logging

import pytest
import torch

from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.errors import ConfigError
from qpipe.quant import compiled, grid
from qpipe.quant.quantizer import QuantContext

CPU = torch.device("cpu")


def quantizer(**options):
    made = UniformWeight(UniformOptions(**options))
    made.attach(QuantContext(compiled=True), "block:weight")
    return made


def weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_codes_are_the_eager_codes(dtype):
    for options in ({"bits": 4}, {"bits": 3, "symmetric": False}, {"bits": 4, "granularity": "tensor"}):
        made = quantizer(**options)
        made.context.scale_dtype = dtype
        value = weight((65, 48), dtype)
        value[3] = 0
        found = made.quantize(value)
        assert made.context.compiled, "fell back to eager mode"
        assert torch.equal(found, made.encode(value).decode(dtype))


def test_a_failing_compiler_is_reported_and_eager_mode_takes_over(monkeypatch, caplog):
    def broken(kernel):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(grid, "_writer", broken)
    made, value = quantizer(bits=4), weight((8, 16))
    with caplog.at_level(logging.WARNING, "qpipe.compile"):
        assert torch.equal(made.quantize(value), made.encode(value).decode())
    assert "no such kernel" in caplog.text and not made.context.compiled


def test_compiled_code_that_differs_is_not_used(monkeypatch, caplog):
    def wrong(kernel):
        return lambda rows, out, axes: (out.zero_(), kernel.grid(rows, axes))[1]

    monkeypatch.setattr(grid, "_writer", wrong)
    made, value = quantizer(bits=4), weight((8, 16))
    with caplog.at_level(logging.WARNING, "qpipe.compile"):
        assert torch.equal(made.quantize(value), made.encode(value).decode())
    assert "differs from eager mode at block:weight" in caplog.text


def test_auto_compiles_long_runs_only(monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: "/usr/bin/g++")
    assert compiled.use_compiled("auto", compiled.WORTHWHILE, CPU)
    assert not compiled.use_compiled("auto", compiled.WORTHWHILE - 1, CPU)
    assert not compiled.use_compiled("off", compiled.WORTHWHILE, CPU)


def test_no_compiler(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    with caplog.at_level(logging.WARNING, "qpipe.compile"):
        assert not compiled.use_compiled("auto", 10**18, CPU)
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        compiled.use_compiled("on", 1, CPU)


def test_on_is_for_cpus():
    with pytest.raises(ConfigError, match="works on CPUs only"):
        compiled.use_compiled("on", 1, torch.device("cuda"))
