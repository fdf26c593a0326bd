"""Modules that host quantizers: they keep what they stand for, and recompute quantized weights under ZeRO-3."""

import copy

import pytest
import torch
from torch import nn

from qpipe.builtin.modules import HOSTS
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.model.taps import Tap
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.modules import QuantModule
from qpipe.quant.quantizer import QuantContext
from qpipe.types import TapStage, WeightLoss


class Counting(UniformWeight):
    calls = 0

    def quantize(self, value, out=None):
        type(self).calls += 1
        return super().quantize(value, out)


def modules():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(12, 8), torch.randn(2, 3, 12)),
        "linear-2d": (nn.Linear(12, 8, bias=False), torch.randn(5, 12)),
        "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(2, 4, 7, 7)),
        "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False, dilation=2), torch.randn(2, 4, 9, 9)),
        "embedding": (nn.Embedding(20, 8, padding_idx=1), torch.randint(0, 20, (2, 5))),
    }


KINDS = list(modules())


def hosted(kind, partitioned=False, quantizer=None):
    module, x = modules()[kind]
    context = QuantContext(partitioned=partitioned)
    HOSTS[type(module)].adopt(module, "m", context)
    quantizer = quantizer or Counting(UniformOptions(bits=4))
    quantizer.attach(context, "m:weight")
    module.host("weight", quantizer)
    return module, x


def gradients(module, x):
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = module(x)
    (y.square().sum() + y.sum()).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    if x.is_floating_point():
        found["input"] = x.grad
    return y.detach(), found


@pytest.mark.parametrize("kind", KINDS)
def test_without_quantizers_nothing_changes(kind):
    plain, x = modules()[kind]
    changed = copy.deepcopy(plain)
    HOSTS[type(changed)].adopt(changed, "m", QuantContext())
    assert list(changed.state_dict()) == list(plain.state_dict())
    for (_, a), (_, b) in zip(changed.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b)
    expected, expected_gradients = gradients(plain, x)
    found, found_gradients = gradients(changed, x)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], g) for name, g in expected_gradients.items())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_uses_the_quantized_weight_and_its_gradient_goes_to_the_weight(kind):
    plain, x = modules()[kind]
    module, _ = hosted(kind)
    decoded = module.hosted("weight").encode(plain.weight.detach()).decode()
    assert not torch.equal(decoded, plain.weight)
    with torch.no_grad():
        plain.weight.copy_(decoded)
    expected, expected_gradients = gradients(plain, x)
    found, found_gradients = gradients(module, x)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], g) for name, g in expected_gradients.items())


@pytest.mark.parametrize("kind", KINDS)
def test_adopting_keeps_identity_type_parameters_and_hooks(kind):
    module, x = modules()[kind]
    original, weight, seen = type(module), module.weight, []
    module.register_forward_hook(lambda *a: seen.append(1))
    HOSTS[original].adopt(module, "m", QuantContext())
    module(x)
    assert isinstance(module, original) and isinstance(module, QuantModule)
    assert module.weight is weight and seen == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_partitioned_gives_the_same_gradients_and_quantizes_again_in_backward(kind):
    expected, expected_gradients = gradients(*hosted(kind))
    module, x = hosted(kind, partitioned=True)
    Counting.calls = 0
    found, found_gradients = gradients(module, x)
    assert torch.equal(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(found_gradients[name], g) for name, g in expected_gradients.items())
    # An embedding's backward needs no weight.
    assert Counting.calls == (1 if kind == "embedding" else 2)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_partitioned_keeps_no_quantized_weight_for_backward(kind):
    def kept(partitioned):
        module, x = hosted(kind, partitioned)
        storages = []

        def pack(tensor):
            storages.append(tensor.untyped_storage().data_ptr())
            return tensor

        quantized = []
        original = module.quantized_weight
        module.quantized_weight = lambda: quantized.append(original()) or quantized[-1]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x.requires_grad_())
        return quantized[0].untyped_storage().data_ptr() in storages

    assert kept(partitioned=False) and not kept(partitioned=True)


def test_what_was_quantized_before_partitioning_is_not_kept():
    """As by passes that set ranges, before an engine takes the model over."""
    module, x = hosted("linear")
    quantizer = module.hosted("weight")
    module(x)
    assert quantizer._cached is not None
    quantizer.context.partitioned = True
    quantizer.context.weights_changed()
    module(x)
    assert quantizer._cached is None


def like(tensor, weight):
    """Of the weight's shape, which may be transposed."""
    return sorted(tensor.shape) == sorted(weight.shape)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_hooks_around_keep_what_is_not_made_again(kind):
    """Activation checkpointing's are such: it would free nothing of what they are not given."""
    expected, expected_gradients = gradients(*hosted(kind))
    module, x = hosted(kind, partitioned=True)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number):
        unpacked.append(number)
        return packed[number]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found, found_gradients = gradients(module, x)
    assert any(tensor.numel() >= x.numel() and not like(tensor, module.weight) for tensor in packed) and unpacked
    assert not any(like(tensor, module.weight) for tensor in packed)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], g) for name, g in expected_gradients.items())


@pytest.mark.parametrize("kind", ["linear", "linear-2d", "convolution"])
def test_partitioned_keeps_no_copy_that_autocast_makes(kind):
    shapes, found = [], []
    for partitioned in (False, True):
        module, x = hosted(kind, partitioned)
        seen = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(module, x))
        shapes.append(any(like(tensor, module.weight) for tensor in seen))
    assert shapes == [True, False]
    assert found[0][0].dtype == torch.bfloat16 and torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())


def test_quantizers_with_parameters_are_not_recomputed():
    """Their parameters are partitioned too, and are not there in the backward pass of the hosting module."""

    class Scaled(Counting):
        def __init__(self, options):
            super().__init__(options)
            self.extra = nn.Parameter(torch.ones(1))

        def surrogate(self, value):
            return value * self.extra

    expected, expected_gradients = gradients(*hosted("linear", quantizer=Scaled(UniformOptions(bits=4))))
    module, x = hosted("linear", partitioned=True, quantizer=Scaled(UniformOptions(bits=4)))
    Counting.calls = Scaled.calls = 0
    found, found_gradients = gradients(module, x)
    assert torch.equal(found, expected) and Scaled.calls == 1
    assert all(torch.equal(found_gradients[name], g) for name, g in expected_gradients.items())


def test_weight_is_quantized_once_per_step():
    module, x = hosted("linear")
    Counting.calls = 0
    module(x), module(x)
    assert Counting.calls == 1
    with torch.no_grad():
        module.weight.mul_(2)
    module.qpipe.context.weights_changed()
    y = module(x)
    assert Counting.calls == 2
    expected = nn.functional.linear(x, module.hosted("weight").encode(module.weight).decode(), module.bias)
    assert torch.equal(y, expected)


def test_order_at_input_and_output():
    module, x = hosted("linear")
    context, calls = module.qpipe.context, []
    context.taps_active = True

    class Noting(UniformActivation):
        def forward(self, value):
            calls.append(self.site)
            return super().forward(value)

    for slot in ("output", "input"):
        quantizer = Noting(ActivationOptions())
        quantizer.attach(context, f"m:{slot}")
        module.host(slot, quantizer)
        module.taps_at(slot).append(Tap(TapStage.REPLACE, lambda t, slot=slot: calls.append(f"tap {slot}") or t * 2))
    y = module(x)
    assert calls == ["tap input", "m:input", "tap output", "m:output"]
    quantize = UniformActivation(ActivationOptions())
    inner = nn.functional.linear(quantize(x * 2), module.quantized_weight(), module.bias)
    assert torch.equal(y, quantize(inner * 2))


def test_embedding_has_no_input_site():
    assert HOSTS[nn.Embedding].slots == ("weight", "output")


class Seeing(UniformWeight):
    """Remembers how many rows it was given."""

    def __init__(self, options):
        super().__init__(options)
        self.seen = []

    def quantize(self, value, out=None):
        self.seen.append(len(value))
        return super().quantize(value, out)


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"bits": 8, "symmetric": False}, {"bits": 3, "granularity": "group", "group_size": 4}],
    ids=str,
)
def test_an_embedding_quantizes_the_rows_of_the_batch_in_training(options):
    rows, ids = hosted("embedding", quantizer=Seeing(UniformOptions(**options)))
    table, _ = hosted("embedding", quantizer=Seeing(UniformOptions(**options)))
    table.weight_quantizer.row_wise = False
    (found, grads), (expected, expected_grads) = gradients(rows, ids), gradients(table, ids)
    assert torch.equal(found, expected) and torch.equal(grads["weight"], expected_grads["weight"])
    assert (rows.weight_quantizer.seen, table.weight_quantizer.seen) == ([10], [20])
    assert bool((grads["weight"][1] == 0).all()), "padding gets no gradient"
    with torch.no_grad():
        assert torch.equal(rows(ids), expected), "evaluation keeps the table"
    assert torch.equal(rows(ids), expected)
    assert rows.weight_quantizer.seen == [10, 20], "a table at hand is used"


def test_an_embedding_quantizes_the_table_where_rows_share_a_scale_or_the_batch_is_larger():
    per_tensor, ids = hosted("embedding", quantizer=Seeing(UniformOptions(bits=8, granularity="tensor")))
    per_tensor(ids)
    assert per_tensor.weight_quantizer.seen == [20]
    per_row, _ = hosted("embedding", quantizer=Seeing(UniformOptions(bits=8)))
    per_row(ids.repeat(2, 1))
    assert per_row.weight_quantizer.seen == [20]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_loss_has_the_gradient_of_the_penalty_on_the_raw_weight(kind):
    module, x = hosted(kind)
    module.qpipe.weight_losses = (WeightLoss("w4", lambda w: w.float().pow(4).mean(), 1.0, lambda path: True),)
    _, without = gradients(module, x)
    module.zero_grad()
    context = module.qpipe.context
    context.due_weight_losses = frozenset({"w4"})
    y = module(x)
    value = context.weight_losses["w4", "m"]
    weight = module.weight.detach().clone().requires_grad_()
    penalty = weight.pow(4).mean()
    penalty.backward()
    torch.testing.assert_close(value, penalty)
    (y.square().sum() + y.sum() + 3 * value).backward()
    torch.testing.assert_close(module.weight.grad, without["weight"] + 3 * weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off", ["collect", "no_grad"])
def test_weight_loss_is_not_computed_while_not_collected(off):
    module, x = hosted("linear")
    module.qpipe.weight_losses = (WeightLoss("never", lambda w: 1 / 0, 1.0, lambda path: True),)
    module.qpipe.context.due_weight_losses = frozenset({"another"} if off == "collect" else {"never"})
    with torch.set_grad_enabled(off != "no_grad"):
        module(x)
    assert not module.qpipe.context.weight_losses
