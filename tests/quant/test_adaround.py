"""AdaRound's parts and one whole optimisation against the reference implementation."""

from decimal import Decimal, localcontext
from typing import get_args

import pytest
import torch
from golden_cases import Golden, case_name
from torch.nn import functional as F

from qpipe.quant.adaround import Decay, Rounding, beta_at, fall, learn_rounding, local_loss

GOLDEN = Golden("adaround")
RELAXATIONS = {"learned_hard_sigmoid": "hard-sigmoid", "learned_sigmoid": "sigmoid"}


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.detach(), expected, **tolerance)


@pytest.mark.parametrize(
    "case", GOLDEN.of("AdaRoundSymmetricUniformQuantizer", "AdaRoundAsymmetricUniformQuantizer"), ids=case_name
)
def test_offsets_of_the_reference(case):
    bits = case["params"]["n_bits"]
    asymmetric = "Asymmetric" in case["function"]
    low, high = (0, 2**bits - 1) if asymmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    zero = GOLDEN.tensor(case, "zero_float").round().clamp(low, high) if asymmetric else torch.zeros(1)
    weight, scale = GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "delta")
    rounding = Rounding(weight, scale, zero, low, high, RELAXATIONS[case["params"]["round_mode"]])
    close(rounding.alpha, GOLDEN.tensor(case, "alpha_init"))
    close(rounding.soft(), GOLDEN.tensor(case, "soft_init"))
    rounding.alpha.data = GOLDEN.tensor(case, "alpha")
    soft = rounding.soft()
    (soft * GOLDEN.tensor(case, "g")).sum().backward()
    close(soft, GOLDEN.tensor(case, "soft"), rtol=0, atol=0)
    close(rounding.hard(), GOLDEN.tensor(case, "hard"), rtol=0, atol=0)
    # The last bit of torch's exponential depends on the processor: they were recorded with AVX-512.
    as_recorded = torch.backends.cpu.get_cpu_capability() == "AVX512"
    rounding_of_exp = 0 if as_recorded else 2 * torch.finfo(torch.float32).eps
    close(rounding.alpha.grad, GOLDEN.tensor(case, "grad_alpha"), rtol=rounding_of_exp, atol=0)


@pytest.mark.parametrize("case", GOLDEN.of("TempDecay"), ids=case_name)
def test_exponent_of_the_reference(case):
    params = case["params"]
    settings = params["t_max"], params["decay_type"], params["decay_shape"], params["rel_decay_start"]
    found = [beta_at(t, *settings) for t in GOLDEN.tensor(case, "t").tolist()]
    assert found == pytest.approx(GOLDEN.tensor(case, "b").tolist(), abs=1e-6)


def exact_fall(x, decay, shape):
    """The formulas of the reference with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        x, shape, span = Decimal(x), Decimal(shape), Decimal(18)
        if decay == "power":
            return float(1 - x**shape)
        if decay == "exp":
            return float(((-shape * x).exp() - (-shape).exp()) / (1 - (-shape).exp()))
        if decay == "sigmoid":
            at = [1 / (1 + (shape * (place - Decimal("0.5"))).exp()) for place in (Decimal(0), x, Decimal(1))]
            return float((at[1] - at[2]) / (at[0] - at[2]))
        return float(1 + shape / span * (1 - x * (1 - (-span / shape).exp())).ln())


@pytest.mark.parametrize("decay", ["power", "exp", "sigmoid", "log"])
@pytest.mark.parametrize("shape", [0.1, 0.48, 0.5, 1.0, 4.0, 30.0, 1500.0])
def test_decays_are_exact_for_flat_and_for_steep_shapes(decay, shape):
    places = [0.0, 0.01, 0.25, 0.5, 0.75, 0.9]
    found = [fall(x, decay, shape) for x in places]
    assert found == pytest.approx([exact_fall(x, decay, shape) for x in places], rel=1e-12, abs=0)


@pytest.mark.parametrize("decay", get_args(Decay))
@pytest.mark.parametrize("shape", [5e-324, 1e-300, 1e-9, 0.02, 0.47, 1419.0, 1420.0, 1e9, 1e300, 1.7e308])
def test_decays_fall_from_1_to_0_for_every_positive_shape(decay, shape):
    found = [fall(place / 64, decay, shape) for place in range(65)]
    assert found[0] == 1 and found[-1] == 0 and found == sorted(found, reverse=True)


@pytest.mark.parametrize("case", GOLDEN.of("CombinedLoss"), ids=case_name)
def test_loss_of_the_reference(case):
    """The sum runs over axis 1: features here, tokens where the reference has a third axis."""
    rounding = Rounding(GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "delta"), torch.zeros(1), -8, 7)
    rounding.alpha.data = GOLDEN.tensor(case, "alpha")
    count, prediction, target = case["params"]["max_count"], GOLDEN.tensor(case, "pred"), GOLDEN.tensor(case, "tgt")
    found = [local_loss(rounding, prediction, target, i, count) for i in range(1, count + 1)]
    close(torch.stack(found), GOLDEN.tensor(case, "loss_per_iter"))


def learned_as_reference(case, order=None):
    """The rounding of a layer after the recorded optimisation; given an order, it sums over features in that."""
    params = case["params"]
    inputs, bias, weight, delta = (GOLDEN.tensor(case, name) for name in ("X", "bias", "W", "delta"))
    order = torch.arange(inputs.shape[1]) if order is None else order

    def layer(x, w):
        return F.linear(x[:, order], w[:, order], bias)

    high = 2 ** (params["n_bits"] - 1)
    rounding, target = Rounding(weight, delta, torch.zeros(1), -high, high - 1), layer(inputs, weight)
    batches = ((inputs[i], target[i]) for i in GOLDEN.tensor(case, "batch_idx").long())
    learn_rounding(rounding, layer, batches, params["iters"], params["lr"])
    return rounding


@pytest.mark.parametrize("case", GOLDEN.of("AdaRound"), ids=case_name)
def test_optimisation_of_the_reference(case):
    """The weights are exactly those recorded, and `alpha` to the 1e-3 that the vectors state wherever it can be.

    At first the soft weight is the weight and the gradient is 0 but for rounding, which Adam divides by its own size:
    the first steps of every `alpha` depend on the order in which a processor sums. Rows (outputs) are problems of their
    own: some come together again, and of the others none can be asked to come closer to what another processor
    recorded than twice as far as other orders of summation move it here.
    """
    inputs, bias, weight = (GOLDEN.tensor(case, name) for name in ("X", "bias", "W"))
    rounding, recorded = learned_as_reference(case), GOLDEN.tensor(case, "alpha_final")
    orders = [torch.randperm(inputs.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    runs = torch.stack([learned_as_reference(case, order).alpha.detach() for order in orders])
    allowed = (2 * (runs.amax(0) - runs.amin(0)).amax(1)).clamp_min(1e-3)
    assert float(allowed.max()) < 0.05 * float(recorded.abs().max())
    assert bool(((rounding.alpha.detach() - recorded).abs().amax(1) <= allowed).all())
    close(rounding.hard(), GOLDEN.tensor(case, "hard_w"), rtol=0, atol=1e-6)
    target = F.linear(inputs, weight, bias)
    nearest, learned = ((F.linear(inputs, w, bias) - target).square().mean() for w in (
        GOLDEN.tensor(case, "nearest_w"), rounding.hard()
    ))  # fmt: skip
    assert float(nearest) == pytest.approx(case["scalars"]["mse_nearest"], rel=1e-4)
    assert float(learned) == pytest.approx(case["scalars"]["mse_adaround"], rel=1e-3) and learned < nearest


def test_levels_at_half_integers():
    """The soft weight starts as the weight, and the hard one lies on the grid, one level above or below."""
    weight, scale, zero = torch.tensor([[-0.9, -0.3, 0.1, 0.7]]), torch.tensor([[0.5]]), torch.tensor([[-0.5]])
    rounding = Rounding(weight, scale, zero, -2, 1)
    close(rounding.soft(), torch.tensor([[-0.75, -0.3, 0.1, 0.7]]))
    assert torch.equal(rounding.hard(), torch.tensor([[-0.75, -0.25, 0.25, 0.75]]))
