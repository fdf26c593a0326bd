"""Moments of weights and the gradient of functions of them, against autograd through the definitions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qpipe import QuantContext, WeightLoss, moments
from qpipe.builtin.lsq import LsqOptions, LsqWeight
from qpipe.builtin.modules import HOSTS
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.model.gradients import is_owned
from qpipe.quant import compiled
from qpipe.quant.moments import WithMoments, from_sums

SHAPES = [(7,), (5, 9), (4, 3, 2, 2), (32, 6)]  # the last one has rows that compiled code rearranges
COMPILERS = [False, pytest.param(True, marks=pytest.mark.skipif(compiled.compiler() is None, reason="no compiler"))]


def weight(shape, dtype=torch.float64, seed=0):
    return (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)


def central(w):
    z = w - w.mean()
    return w.mean(), z.square().mean(), z.pow(3).mean(), z.pow(4).mean()


def function(mean, second, third, fourth):
    """Depends on every moment, and not linearly."""
    return 3 * mean.square() + second.sqrt() + third * fourth + fourth / second.square()


@pytest.mark.parametrize("compile", COMPILERS)
def test_moments_and_gradients_of_several_weights(compile):
    weights = [weight(shape).requires_grad_() for shape in SHAPES]
    found = moments(weights, QuantContext(compiled=compile))
    assert found.number.tolist() == [7, 45, 48, 192]
    for i, w in enumerate(weights):
        torch.testing.assert_close(torch.stack([m[i] for m in found[1:]]), torch.stack(central(w)), rtol=1e-12, atol=0)
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients = torch.autograd.grad((factors * function(*found[1:])).sum(), weights)
    for factor, w, gradient in zip(factors, weights, gradients, strict=True):
        (expected,) = torch.autograd.grad(factor * function(*central(w)), w)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compile", COMPILERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_narrow_types(dtype, tolerance, compile):
    w = weight((70, 50), dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(function(*moments([w], QuantContext(compiled=compile))[1:]).sum(), w)
    exact = w.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(function(*central(exact)), exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_far_pilot_loses_no_precision():
    w = weight((64, 64), torch.float32) * 0.01
    w[0, 0] = 1e3  # the first element is the pilot
    torch.testing.assert_close(
        torch.stack([m[0] for m in moments([w])[1:]]), torch.stack(central(w.double())), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("compile", COMPILERS)
def test_the_gradient_adds_to_that_of_the_weights_user(compile):
    w, x = weight((6, 4)).requires_grad_(), weight((5, 4), seed=1)
    same, sums = WithMoments.apply(w, QuantContext(compiled=compile))
    assert same.data_ptr() == w.data_ptr()
    (F.linear(x, same).square().sum() + 2 * function(*from_sums([sums])[1:]).sum()).backward()
    plain = w.detach().requires_grad_()
    (F.linear(x, plain).square().sum() + 2 * function(*central(plain))).backward()
    torch.testing.assert_close(w.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_sums_that_are_not_used_cost_nothing():
    w, x = weight((6, 4)).requires_grad_(), weight((5, 4), seed=1)
    F.linear(x, WithMoments.apply(w, QuantContext())[0]).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(6, 4))


def test_empty_weights_are_refused():
    with pytest.raises(ValueError, match="empty"):
        moments([torch.empty(0, 3)])


class Seen(torch.autograd.Function):
    """Notes whether its gradient is owned, and where it lies."""

    owned: list[bool] = []

    @staticmethod
    def forward(ctx, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, *grads):
        Seen.owned.append(is_owned(grads[0]))
        return grads[0]


USERS = {
    "linear": lambda w: F.linear(torch.ones(2, 3, 6), w, torch.zeros(4, requires_grad=True)),
    "convolution": lambda w: F.conv1d(torch.ones(1, 2, 7), w.view(4, 2, 3)),
    "embedding": lambda w: F.embedding(torch.tensor([[1, 2]]), w),
}
SHARING = {
    "sum": lambda w, other: w + other,
    "transposed": lambda w, other: w + other.t().contiguous().t(),
    "broadcast": lambda w, other: w + other.sum(),
}


@pytest.mark.parametrize("user", USERS)
def test_gradients_of_what_uses_weights_are_owned(user):
    """Else every quantizer with a gradient of its own, and every penalty, writes to fresh memory."""
    Seen.owned.clear()
    USERS[user](Seen.apply(weight((4, 6), torch.float32).requires_grad_())).square().sum().backward()
    assert Seen.owned == [True]


@pytest.mark.parametrize("sharing", SHARING)
def test_shared_gradients_are_not_overwritten(sharing):
    """The other part's gradient is the same tensor, and is read after this part's backward pass."""
    x, other, w = weight((5, 6), seed=1), weight((4, 6), seed=2), weight((4, 6), seed=3)

    def total(same, w, other):
        (F.linear(x, SHARING[sharing](other * 3, same)).square().sum() + function(*central(w))).backward()
        return other.grad, w.grad

    plain = [t.clone().requires_grad_() for t in (w, other)]
    expected = total(plain[0], plain[0], plain[1])
    w, other = (t.clone().requires_grad_() for t in (w, other))
    same, sums = WithMoments.apply(w, QuantContext())
    (F.linear(x, SHARING[sharing](other * 3, same)).square().sum() + function(*from_sums([sums])[1:]).sum()).backward()
    for found, wanted in zip((other.grad, w.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# --- in modules -------------------------------------------------------------------------------------------------------

QUANTIZERS = {
    "none": lambda: None,
    "uniform": lambda: UniformWeight(UniformOptions(bits=4)),
    "lsq": lambda: LsqWeight(LsqOptions(bits=4)),
}


def hosted(quantizer, partitioned):
    torch.manual_seed(0)
    module = nn.Linear(12, 8)
    context = QuantContext(partitioned=partitioned, due_weight_losses=frozenset({"f"}))
    HOSTS[nn.Linear].adopt(module, "m", context)
    made = QUANTIZERS[quantizer]()
    if made is not None:
        made.attach(context, "m:weight")
        made.initialize(module.weight.detach())
        module.host("weight", made)
    fn = lambda m: function(*m[1:])  # noqa: E731
    module.qpipe.weight_losses = (WeightLoss("f", fn, 1.0, lambda path: True, moments=True),)
    return module, context


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_modules_add_it_and_do_not_rely_on_a_partitioned_weight(quantizer, partitioned):
    module, context = hosted(quantizer, partitioned)
    x = torch.randn(3, 12)
    y = module(x)
    if partitioned:  # ZeRO-3 takes the memory back, and gathers the weight elsewhere for the backward pass
        before, module.weight.data = module.weight.data, module.weight.data.clone()
        before.fill_(torch.nan)
    (sums,) = context.weight_losses.values()
    (y.square().sum() + function(*from_sums([sums])[1:]).sum()).backward()
    plain, context = hosted(quantizer, False)
    context.due_weight_losses = frozenset()
    plain(x).square().sum().backward()
    exact = plain.weight.detach().double().requires_grad_()
    function(*central(exact)).backward()
    torch.testing.assert_close(module.weight.grad, plain.weight.grad + exact.grad.float(), rtol=1e-5, atol=1e-5)
