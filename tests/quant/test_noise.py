"""QuantNoise: a random part of a weight is quantized in training steps."""

import itertools

import pytest
import torch

import qpipe
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.testing import check_rules, tiny_config
from qpipe.testing.contract import weights_hash

RULES = [{"site": "{block}.*:weight", "quantizer": "lsq", "options": {"bits": 3}}]


def make(noise, micro_batch=0, seed=0, site="m:weight"):
    quantizer = UniformWeight(UniformOptions(bits=2))
    quantizer.attach(QuantContext(noise=noise, micro_batch=micro_batch, seed=seed), site)
    return quantizer


def weight():
    return torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()


def share_quantized(quantizer, value):
    with torch.enable_grad():
        out = quantizer(value)
    lattice = quantizer.encode(value).decode()
    assert bool(((out == lattice) | (out == value)).all())
    return float((out != value).float().mean())


@pytest.mark.parametrize("noise", [0.1, 0.5, 0.9])
def test_the_part_is_quantized_and_the_rest_is_not(noise):
    assert share_quantized(make(noise), weight()) == pytest.approx(noise, abs=0.03)


def test_none_and_all():
    value = weight()
    assert share_quantized(make(0.0), value) == 0
    assert torch.equal(make(1.0)(value), make(1.0).encode(value).decode())


def test_evaluation_quantizes_all():
    value, quantizer = weight(), make(0.5)
    with torch.no_grad():
        assert torch.equal(quantizer(value), quantizer.encode(value).decode())
    assert torch.equal(quantizer.eval()(value), quantizer.encode(value).decode())


def test_draws_depend_on_seed_micro_batch_and_site_only():
    value = weight()
    first = make(0.5)(value)
    assert torch.equal(make(0.5)(value), first)
    for other in (make(0.5, micro_batch=1), make(0.5, seed=1), make(0.5, site="n:weight")):
        assert not torch.equal(other(value), first)


def test_every_forward_pass_of_training_draws_anew(tmp_path, monkeypatch):
    """Also the micro-batches of one optimizer step, as published."""
    drawn, original = [], Quantizer._drawn

    def recorded(quantizer, value):
        drawn.append((quantizer.site, original(quantizer, value)))
        return drawn[-1][1]

    monkeypatch.setattr(Quantizer, "_drawn", recorded)
    rules = [{"site": "bert.encoder.layer.0.output.dense:weight", "quantizer": "uniform", "options": {"bits": 3}}]
    qpipe.execute(
        tiny_config(
            tmp_path,
            quantization__preset=None,
            quantization__rules=rules,
            quantization__noise=0.5,
            train__accumulation=2,
            train__max_steps=2,
        )
    )
    assert len(drawn) == 4, "two steps of two micro-batches"
    for (_, one), (_, other) in itertools.combinations(drawn, 2):
        assert 0.4 < float((one == other).float().mean()) < 0.6, "independent draws agree in every second element"


@pytest.mark.slow
def test_contract():
    """Resumes bit for bit, and two processes under ZeRO-3 draw what one process draws."""
    check_rules(RULES, quantization__noise=0.5, train__accumulation=2)


def test_all_of_the_weight_is_plain_training_bit_for_bit(tmp_path):
    hashes = []
    for number, noise in enumerate(({}, {"quantization__noise": 1.0}, {"quantization__noise": 0.5})):
        config = tiny_config(tmp_path, quantization__rules=RULES, train__max_steps=2, **noise)
        config = config.model_copy(update={"out": str(tmp_path / f"run{number}")})
        qpipe.execute(config)
        hashes.append(weights_hash(tmp_path / f"run{number}"))
    assert hashes[0] == hashes[1] != hashes[2]
