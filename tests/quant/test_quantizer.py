"""The base class: straight-through gradients, caching, switching off."""

import pytest
import torch

from qpipe import QTensor, Quantizer, straight_through
from qpipe.quant.quantizer import QuantContext, Visit


class Halves(Quantizer):
    """Rounds to multiples of 0.5 and counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def encode(self, value):
        self.calls += 1
        codes = torch.round(value.float() * 2)
        return QTensor(codes, torch.tensor([0.5]), torch.zeros(1), 16)


class Doubling(Halves):
    def surrogate(self, value):
        return value * 3


def attached(cls=Halves, site="m:weight", **context):
    quantizer = cls()
    quantizer.attach(QuantContext(**context), site)
    return quantizer


def test_straight_through_is_exact_and_passes_the_gradient():
    x = torch.tensor([1e8, 0.3], requires_grad=True)
    q = torch.tensor([0.1, 0.7], requires_grad=True)
    y = straight_through(x, q)
    assert torch.equal(y, q)  # 1e8 + (0.1 - 1e8) would give 0
    upstream = torch.tensor([2.0, 5.0])
    y.backward(upstream)
    assert torch.equal(x.grad, upstream) and q.grad is None


def test_surrogate_takes_the_gradient():
    x = torch.tensor([0.3], requires_grad=True)
    y = attached(Doubling)(x)
    assert y.item() == 0.5
    y.backward()
    assert x.grad.item() == 3.0


def test_without_gradients_no_graph_is_built():
    x = torch.tensor([0.3], requires_grad=True)
    with torch.no_grad():
        assert not attached()(x).requires_grad


def test_weights_are_quantized_once_until_they_are_said_to_change():
    quantizer = attached()
    weight = torch.tensor([0.3])
    first = quantizer(weight)
    quantizer(weight)
    assert quantizer.calls == 1
    weight.fill_(0.9)
    assert quantizer(weight).item() == 0.5 and quantizer.calls == 1
    quantizer.context.weights_changed()
    assert quantizer(weight).item() == 1.0 and quantizer.calls == 2
    assert first.data_ptr() == quantizer(weight).data_ptr(), "the buffer is not used again"


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_cache_notices_another_dtype_or_shape(change):
    quantizer = attached()
    quantizer(torch.tensor([0.3]))
    other = torch.tensor([0.9], dtype=torch.bfloat16) if change == "dtype" else torch.tensor([0.9, 0.9])
    assert torch.equal(quantizer(other), torch.ones_like(other))


@pytest.mark.parametrize(("site", "context"), [("m:input", {}), ("m:weight", {"partitioned": True})])
def test_activations_and_partitioned_weights_are_not_cached(site, context):
    quantizer = attached(site=site, **context)
    assert quantizer(torch.tensor([0.3])).item() == 0.5
    assert quantizer(torch.tensor([0.9])).item() == 1.0


def test_cache_is_not_part_of_the_state():
    quantizer = attached()
    quantizer(torch.tensor([0.3]))
    assert not quantizer.state_dict()


def test_disabled_is_the_identity():
    quantizer = attached(enabled=False)
    x = torch.tensor([0.3])
    assert quantizer(x) is x and quantizer.calls == 0


def test_visited_sites_are_noted_when_asked_for():
    quantizer = attached(site="m:input")
    quantizer(torch.tensor([0.3]))
    quantizer.context.visited = {}
    quantizer(torch.tensor([0.0]))
    assert quantizer.context.visited == {"m:input": Visit(changed=False, elements=1)}
    quantizer(torch.tensor([0.3, 0.4]))
    assert quantizer.context.visited == {"m:input": Visit(changed=True, elements=3)}


def test_snap_rounds_and_replaces_zero():
    quantizer = attached(scale_dtype=torch.bfloat16)
    snapped = quantizer.snap(torch.tensor([0.1, 0.0]))
    assert snapped.dtype == torch.float32
    assert snapped.tolist() == [torch.tensor(0.1).bfloat16().float().item(), 1.0]


def test_encode_must_be_implemented():
    with pytest.raises(NotImplementedError, match="Quantizer must implement encode"):
        Quantizer().encode(torch.ones(1))
