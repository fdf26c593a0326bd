"""The autograd functions that replace values and stop gradients without cutting the graph."""

import torch

from qpipe import Inject, StopGradient
from qpipe.model.gradients import WithWeightLoss


def test_inject_gives_the_teachers_value_and_no_gradient():
    student = torch.randn(2, 3, requires_grad=True)
    teacher = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = Inject.apply(student, teacher)
    assert y.dtype == student.dtype and torch.equal(y, teacher.float())
    assert y.requires_grad, "the graph must go on through the student"
    y.sum().backward()
    assert torch.equal(student.grad, torch.zeros(2, 3)) and teacher.grad is None


def test_inject_copies():
    student, teacher = torch.randn(3, requires_grad=True), torch.randn(3)
    y = Inject.apply(student, teacher)
    y.data.add_(1)
    assert not torch.equal(y, teacher)


def test_stop_gradient_sends_zeros_in_place_of_nothing():
    x = torch.randn(3, requires_grad=True)
    y = StopGradient.apply(x)
    assert torch.equal(y, x) and y.requires_grad
    (y * 5).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


def penalty(w):
    return w.float().pow(3).sum()


def test_weight_loss_has_the_gradients_of_the_plain_sum():
    x, weight = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    bare = torch.nn.functional.linear(x, weight).requires_grad_()
    expected = torch.autograd.grad(bare.square().sum() + 0.25 * penalty(weight), weight)[0]
    y, value = WithWeightLoss.apply(torch.nn.functional.linear(x, weight), weight, penalty)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, penalty(weight))
    (y.square().sum() + 0.25 * value).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_weight_losses_in_a_row_add_up():
    weight = torch.randn(2, 3, requires_grad=True)
    y = torch.nn.functional.linear(torch.ones(1, 3), weight)
    y, first = WithWeightLoss.apply(y, weight, penalty)
    y, second = WithWeightLoss.apply(y, weight, lambda w: w.sum())
    (y.sum() + 2 * first + 3 * second).backward()
    torch.testing.assert_close(weight.grad, 1 + 6 * weight.detach().square() + 3)


def test_weight_loss_in_bfloat16_returns_the_weights_type():
    weight = torch.randn(2, 3).bfloat16().requires_grad_()
    y, value = WithWeightLoss.apply(torch.nn.functional.linear(torch.ones(1, 3).bfloat16(), weight), weight, penalty)
    (y.float().sum() + value).backward()
    assert weight.grad.dtype == torch.bfloat16


def test_weight_loss_that_is_not_used_costs_no_gradient():
    weight = torch.randn(2, 3, requires_grad=True)
    y, _ = WithWeightLoss.apply(torch.nn.functional.linear(torch.ones(1, 3), weight), weight, penalty)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 3))
