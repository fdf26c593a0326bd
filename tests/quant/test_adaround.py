"""AdaRound's parts and one whole optimisation against the reference implementation."""

import pytest
import torch
from golden_cases import Golden, case_name
from torch.nn import functional as F

from qpipe.quant.adaround import Rounding, beta_at, learn_rounding, local_loss

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
    close(rounding.alpha.grad, GOLDEN.tensor(case, "grad_alpha"), rtol=0, atol=0)


@pytest.mark.parametrize("case", GOLDEN.of("TempDecay"), ids=case_name)
def test_exponent_of_the_reference(case):
    params = case["params"]
    settings = params["t_max"], params["decay_type"], params["decay_shape"], params["rel_decay_start"]
    found = [beta_at(t, *settings) for t in GOLDEN.tensor(case, "t").tolist()]
    assert found == pytest.approx(GOLDEN.tensor(case, "b").tolist(), abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN.of("CombinedLoss"), ids=case_name)
def test_loss_of_the_reference(case):
    """The sum runs over axis 1: features here, tokens where the reference has a third axis."""
    rounding = Rounding(GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "delta"), torch.zeros(1), -8, 7)
    rounding.alpha.data = GOLDEN.tensor(case, "alpha")
    count, prediction, target = case["params"]["max_count"], GOLDEN.tensor(case, "pred"), GOLDEN.tensor(case, "tgt")
    found = [local_loss(rounding, prediction, target, i, count) for i in range(1, count + 1)]
    close(torch.stack(found), GOLDEN.tensor(case, "loss_per_iter"))


def learned_as_reference(case, dtype):
    """The rounding of a layer after the recorded optimisation, computed in a type."""
    params = case["params"]
    inputs, bias, weight, delta = (GOLDEN.tensor(case, name).to(dtype) for name in ("X", "bias", "W", "delta"))
    high = 2 ** (params["n_bits"] - 1)
    rounding = Rounding(weight, delta, torch.zeros(1, dtype=dtype), -high, high - 1)
    target = F.linear(inputs, weight, bias)
    batches = ((inputs[i], target[i]) for i in GOLDEN.tensor(case, "batch_idx").long())
    learn_rounding(rounding, lambda x, w: F.linear(x, w, bias), batches, params["iters"], params["lr"])
    return rounding


@pytest.mark.parametrize("case", GOLDEN.of("AdaRound"), ids=case_name)
def test_optimisation_of_the_reference(case):
    """The weights are exactly those recorded; `alpha` is as close as rounding lets two runs of these steps be.

    Adam divides small gradients by their size, so that the last bits of matrix products, which differ between
    processors, grow: float64 moves `alpha` by as much as another processor does.
    """
    inputs, bias, weight = (GOLDEN.tensor(case, name) for name in ("X", "bias", "W"))
    rounding, exact = learned_as_reference(case, torch.float32), learned_as_reference(case, torch.float64)
    moved = float((rounding.alpha.double() - exact.alpha).detach().abs().max())
    assert moved < 0.05 * float(exact.alpha.detach().abs().max())
    close(rounding.alpha, GOLDEN.tensor(case, "alpha_final"), rtol=0, atol=max(1e-3, moved))
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
