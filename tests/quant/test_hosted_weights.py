"""Every built-in quantizer of weights in every kind of module, against the same quantizer on the weight as a matrix."""

import copy

import pytest
import torch
from torch import nn

from qpipe.builtin.modules import HOSTS
from qpipe.host import load_plugins
from qpipe.quant.quantizer import QuantContext

KINDS = {kind.name: kind for kind in load_plugins({}).collect("qpipe_quantizers").values() if "weight" in kind.slots}
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 4}]
QUANTIZERS = [
    ("lsq", {"bits": 3}),
    ("lsq", {"bits": 1, "levels": "mid-rise"}),
    ("lsq+", {"bits": 3}),
    ("dorefa", {"bits": 3}),
    ("dorefa", {"bits": 2, "output": "unit"}),
    ("dorefa", {"bits": 1}),
    ("binary", {}),
    ("binary", {"keep_zeros": True}),
    ("laq", {"bits": 2}),
    ("laq", {"bits": 3, "divisor": "magnitudes"}),
    ("uniform", {"bits": 3, "symmetric": False}),
    ("uniform-static", {"bits": 3, "range": "mse"}),
]


def modules():
    """A module of each kind and an input; ids repeat, and do not name every row."""
    torch.manual_seed(0)
    return {
        "convolution": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7)),
        "depthwise": (nn.Conv2d(8, 8, 2, groups=8, bias=False), torch.randn(2, 8, 5, 5)),
        "embedding": (nn.Embedding(20, 8), torch.tensor([[3, 7, 3], [0, 19, 7]])),
        "linear": (nn.Linear(8, 6), torch.randn(5, 8)),
    }


def built(name, options):
    quantizer = KINDS[name].build(KINDS[name].options(**options))
    quantizer.attach(QuantContext(), "m:weight")
    return quantizer


def as_matrix(name, options, weight, grad):
    """The quantized matrix, and the gradients of matrix and parameters for that of the quantized one."""
    quantizer, rows = built(name, options), weight.detach().flatten(1).requires_grad_()
    with torch.no_grad():
        quantizer.initialize(rows.detach())
    out = quantizer(rows)
    gradients = torch.autograd.grad(out, (rows, *quantizer.parameters()), grad.flatten(1))
    return out.detach(), [g.detach() for g in gradients]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=str)
@pytest.mark.parametrize("kind", ["convolution", "depthwise", "embedding", "linear"])
def test_output_and_gradients_are_those_of_the_matrix(kind, name, options, granularity):
    """In training, where of an embedding only the rows that are looked up may be quantized, and in evaluation."""
    plain, x = modules()[kind]
    module, settings = copy.deepcopy(plain), {**options, **granularity}
    quantizer = built(name, settings)
    HOSTS[type(module)].adopt(module, "m", quantizer.context)
    with torch.no_grad():
        quantizer.initialize(module.weight)
    module.host("weight", quantizer)
    upstream = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(1))
    output = module(x)
    output.backward(upstream)
    # What the plain module computes with the quantized matrix, and the gradient that it gives this.
    quantized, _ = as_matrix(name, settings, plain.weight, torch.zeros_like(plain.weight))
    assert not torch.allclose(quantized.view_as(plain.weight), plain.weight)
    with torch.no_grad():
        weight = plain.weight.clone()
        plain.weight.copy_(quantized.view_as(weight))
    expected = plain(x)
    (grad,) = torch.autograd.grad(expected, plain.weight, upstream)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    _, (wanted, *rest) = as_matrix(name, settings, weight, grad)
    torch.testing.assert_close(module.weight.grad, wanted.view_as(weight), rtol=1e-4, atol=1e-6)
    for parameter, expected_grad in zip(quantizer.parameters(), rest, strict=True):
        torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), expected)
        assert torch.equal(quantizer.encode(weight).decode(), quantized.view_as(weight))
