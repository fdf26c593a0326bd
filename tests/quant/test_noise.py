"""QuantNoise: a random part of a weight is quantized in training steps."""

import itertools

import pytest
import torch

import qpipe
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.host import load_plugins
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


def squashed(top):
    """`tanh(w) / max|tanh(w)|` times the largest level."""
    return lambda w: w.tanh() / w.tanh().abs().max() * top(w)


def itself(w):
    return w


def same_for(bits, unrounded=itself, **options):
    return [({"bits": b, **options}, unrounded) for b in bits]


# By name of the quantizer: options, and what a weight is without rounding.
UNROUNDED = {
    "uniform": [*same_for((2, 8)), *same_for((3,), symmetric=False)],
    "uniform-static": [*same_for((2, 8)), *same_for((3,), mid_rise=True), *same_for((3,), keep_mean=True)],
    "lsq": [*same_for((2, 8)), *same_for((1,), levels="mid-rise")],
    "lsq+": same_for((2, 8)),
    "binary": [({}, itself)],
    "laq": same_for((2, 3)),
    "dorefa": [
        *same_for((1,)),
        *same_for((2, 8), squashed(lambda w: 1.0), output="unit"),
        *same_for((2, 8), squashed(lambda w: w.abs().max()), output="max-abs"),
    ],
}
KINDS = {kind.name: kind for kind in load_plugins({}).collect("qpipe_quantizers").values() if "weight" in kind.slots}
CASES = [(name, options, unrounded) for name, cases in UNROUNDED.items() for options, unrounded in cases]


def test_every_built_in_quantizer_of_weights_is_among_the_cases():
    assert KINDS.keys() == UNROUNDED.keys()


@pytest.mark.parametrize(("name", "options", "unrounded"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_the_rest_is_the_weight_without_rounding(name, options, unrounded):
    """In value and in gradient; the drawn elements are the quantized ones."""
    value, grad = weight(), torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    quantizer = KINDS[name].build(KINDS[name].options(**options))
    quantizer.attach(QuantContext(noise=0.5), "m:weight")
    quantizer.initialize(value.detach())
    with torch.no_grad():
        expected, lattice = unrounded(value), quantizer.encode(value).decode()
    out = quantizer(value)
    drawn = out == lattice
    torch.testing.assert_close(out[~drawn], expected[~drawn], rtol=1e-5, atol=1e-6)
    assert 0.4 < float(drawn.float().mean()) < 0.6
    quantizer.context.noise = 0.0
    none = quantizer(value)
    torch.testing.assert_close(none, expected, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(none, value, grad)
    (wanted,) = torch.autograd.grad(unrounded(value), value, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


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
