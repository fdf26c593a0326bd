"""One quantized activation for two quantizers: when it is the same, and when not."""

import copy
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.quantizer import QuantContext


def pair(**changes):
    """Two quantizers of one model at inputs."""
    context = QuantContext()
    made = [UniformActivation(ActivationOptions(**options)) for options in ({}, changes)]
    for quantizer, path in zip(made, "qk", strict=True):
        quantizer.attach(context, f"{path}:input")
    return made


@pytest.fixture
def value():
    return torch.randn((2, 3, 8), generator=torch.Generator().manual_seed(0))


def test_an_alias_is_the_same_activation(quantized_sites, value):
    first, second = pair()
    assert first(value).data_ptr() == second(value.detach()).data_ptr()
    assert quantized_sites == ["q:input"]


@pytest.mark.parametrize(
    "changes", [{"bits": 4}, {"symmetric": False}, {"granularity": "tensor"}, {"narrow": True}, {"clip": 1.0}]
)
def test_other_options_share_nothing(quantized_sites, value, changes):
    first, second = pair(**changes)
    alone = UniformActivation(ActivationOptions(**changes))
    alone.attach(QuantContext(), "k:input")
    first(value)
    assert torch.equal(second(value), alone(value)) and len(quantized_sites) == 3


def test_a_changed_activation_is_quantized_again(quantized_sites, value):
    first, second = pair()
    before = first(value)
    value.mul_(2)
    assert torch.equal(second(value), before * 2) and len(quantized_sites) == 2


def test_a_changed_result_is_not_handed_on(quantized_sites, value):
    first, second = pair()
    expected = first(value).clone()
    again = second(value)
    again.zero_()
    assert torch.equal(first(value), expected) and len(quantized_sites) == 2


def test_another_view_of_the_memory_is_another_activation(quantized_sites, value):
    first, second = pair()
    first(value)
    assert torch.equal(second(value[:1]), first(value)[:1]) and quantized_sites[:2] == ["q:input", "k:input"]


def test_memory_that_was_used_again_is_not_mistaken(value):
    """A new tensor often lies where the last one did, and has been changed as often."""
    first, second = pair()
    for seed in range(20):
        x = torch.randn((2, 3, 8), generator=torch.Generator().manual_seed(seed))
        expected = UniformActivation(ActivationOptions()).quantize(x)
        assert torch.equal((first, second)[seed % 2](x), expected)
        del x


def test_experiments_with_steps_share_nothing(quantized_sites, value):
    first, second = pair()
    first.context.rescale = lambda scale: scale * 0.9
    first(value), second(value)
    assert len(quantized_sites) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_shares_nothing(quantized_sites, value, inside):
    """Tensors made there do not count their changes; the activation may be older."""
    first, second = pair()
    with torch.inference_mode():
        mine = value.clone() if inside else value
        assert torch.equal(first(mine), second(mine)) and len(quantized_sites) == 2
    assert torch.equal(first(value), second(value)) and len(quantized_sites) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_share_nothing_with_it(quantized_sites, value, copied):
    """Nor do they free what is not theirs when they go, as averages of weights do in every step."""
    first, second = pair()
    expected = first(value)
    for _ in range(20):
        twin = copied(second)
        assert twin.context.shared is not second.context.shared
        assert torch.equal(twin(value), expected)
        del twin
    assert len(quantized_sites) == 21 and torch.equal(second(value), expected) and len(quantized_sites) == 21


def test_the_last_result_is_gone_before_the_next_is_made(monkeypatch, value):
    first, second = pair()
    result = StorageWeakRef(first(value).untyped_storage())
    plain, expired = UniformActivation.quantize_within, []

    def noting(self, x, ends=None):
        expired.append(result.expired())
        return plain(self, x, ends)

    monkeypatch.setattr(UniformActivation, "quantize_within", noting)
    second(value + 1)
    assert expired == [True]


def test_nothing_is_kept_after_a_step(value):
    first, _ = pair()
    result = StorageWeakRef(first(value).untyped_storage())
    first.context.weights_changed()
    assert result.expired()
