"""The joint search for clips against a run of the reference, on its network and data."""

import pytest
import torch
from golden_cases import Golden, case_name
from torch import nn
from torch.nn import functional as F

from qpipe.errors import TrainingError
from qpipe.quant.lapq import lapq, parabola_minimum
from qpipe.quant.ranges import search_grid
from qpipe.quant.rounding import round_to_codes
from qpipe.quant.static import StaticOptions, StaticWeight

GOLDEN = Golden("lapq")


class Weight:
    """The clip of a layer's weight, per tensor, with the reference's levels."""

    def __init__(self, layer, bits):
        self.layer, self.weight = layer, layer.weight.detach().clone()
        self.quantizer = StaticWeight(StaticOptions(bits=bits, granularity="tensor", mid_rise=True))

    def start(self, p):
        self.base = self.quantizer.search(self.weight, method="lp", p=p)
        self.scale(1.0)

    def scale(self, factor):
        self.quantizer.set_grid(self.base[0] * factor, self.base[1], self.weight)
        self.layer.weight.data = self.quantizer.quantize(self.weight)

    @property
    def clip(self):
        return float(self.quantizer.scale) * (2**self.quantizer.bits - 1) / 2


class Activation:
    """The clip of what a ReLU gives, from the first values seen."""

    def __init__(self, bits):
        self.top, self.seen, self.step = 2**bits - 1, None, None

    def __call__(self, x):
        if self.seen is None:
            self.seen = x
        return x if self.step is None else round_to_codes(x, self.step, 0.0, 0, self.top) * self.step

    def start(self, p):
        self.base, _ = search_grid(self.seen, (0, 1), 0, self.top, False, "lp", lambda scale: scale, p=p)
        self.scale(1.0)

    def scale(self, factor):
        self.step = self.base * factor

    @property
    def clip(self):
        return float(self.step) * self.top


class Network:
    """The reference's three-layer perceptron with its calibration data."""

    def __init__(self, case):
        self.layers = []
        for index in (0, 2, 4):
            weight, bias = GOLDEN.tensor(case, f"net.{index}.weight"), GOLDEN.tensor(case, f"net.{index}.bias")
            layer = nn.Linear(*reversed(weight.shape)).requires_grad_(False)
            layer.weight.data, layer.bias.data = weight, bias
            self.layers.append(layer)
        self.inputs, self.labels = GOLDEN.tensor(case, "X"), GOLDEN.tensor(case, "Y").long()
        bits = case["params"]["bit_act"]
        self.activations = [Activation(bits), Activation(bits)] if bits else []
        self.clips = [Weight(layer, case["params"]["bit_weights"]) for layer in self.layers] + self.activations

    def loss(self):
        x = self.layers[0](self.inputs)
        for number, layer in enumerate(self.layers[1:]):
            x = F.relu(x)
            x = layer(self.activations[number](x) if self.activations else x)
        return float(F.cross_entropy(x, self.labels))


@pytest.mark.parametrize("case", GOLDEN.of("LAPQ"), ids=case_name)
def test_a_run_of_the_reference(case):
    network, scalars = Network(case), case["scalars"]
    assert network.loss() == pytest.approx(scalars["loss_fp"], rel=1e-4)
    result = lapq(network.clips, network.loss, evaluations=1000)
    assert torch.tensor(result.exponents).tolist() == pytest.approx(GOLDEN.tensor(case, "p_grid").tolist())
    # Its clips come from a local search, so that single losses differ; the curves are alike.
    ratios = torch.tensor(result.losses) / GOLDEN.tensor(case, "p_losses")
    assert 0.7 < float(ratios.min()) and float(ratios.max()) < 1.4 and abs(float(ratios.median()) - 1) < 0.1
    assert result.start_loss <= min(result.losses) <= 1.05 * scalars["loss_init"]
    assert result.loss == pytest.approx(network.loss()), "the clips are left at the result"
    assert result.loss < 0.9 * result.start_loss and result.loss <= scalars["loss_init"]
    assert all(clip.clip > 0 for clip in network.clips)
    step = result.exponents[1] - result.exponents[0]
    assert result.p == pytest.approx(scalars["p_star"], abs=step), "of losses that differ as above"


@pytest.mark.parametrize("case", GOLDEN.of("LAPQ"), ids=case_name)
def test_the_start_of_the_reference(case):
    """Its exponent from its losses, and the clips of that exponent: both searches end near the least error."""
    exponents, losses = (GOLDEN.tensor(case, name).tolist() for name in ("p_grid", "p_losses"))
    assert parabola_minimum(exponents, losses) == pytest.approx(case["scalars"]["p_star"], rel=1e-6)
    network = Network(case)
    network.loss()  # activations see their first values
    for clip in network.clips:
        clip.start(case["scalars"]["p_star"])
    # Recorded in the order of modules: linear maps are the even ones, what their ReLUs give the odd ones.
    recorded = dict(zip(sorted(case["params"]["layers"]), GOLDEN.tensor(case, "alpha_init").tolist(), strict=True))
    found = {name: clip.clip for name, clip in zip(("0", "2", "4", "1", "3"), network.clips, strict=False)}
    assert found == pytest.approx(recorded, rel=0.05)
    assert network.loss() == pytest.approx(case["scalars"]["loss_init"], rel=0.1)


class Slope:
    """A clip whose loss falls all the way to 0 and below."""

    def start(self, p):
        self.factor = 1.0

    def scale(self, factor):
        self.factor = factor


def test_no_clip_becomes_negative():
    clips = [Slope(), Slope()]
    result = lapq(clips, lambda: sum(clip.factor for clip in clips), evaluations=200)
    assert all(0.1 <= clip.factor < 0.2 for clip in clips) and result.loss < 0.4


def test_the_budget_is_kept_and_the_best_point_with_it():
    clips, seen = [Slope(), Slope()], []

    def loss():
        seen.append(sum((clip.factor - 0.5) ** 2 for clip in clips))
        return seen[-1]

    result = lapq(clips, loss, evaluations=7)
    assert result.evaluations == len(seen) and len(seen) <= 7 + 11
    assert result.loss == min(seen) == sum((clip.factor - 0.5) ** 2 for clip in clips)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_never_finite_is_refused(value):
    with pytest.raises(
        TrainingError, match=rf"the loss on the calibration examples is {value} with the clips .* check"
    ):
        lapq([Slope()], lambda: value)


def test_exponents_without_a_finite_loss_are_passed_over():
    clips, losses = [Slope()], iter([float("nan"), 3.0, float("inf"), *[2.0] * 20])
    result = lapq(clips, lambda: next(losses), evaluations=5, exponents=(2.0, 3.0, 4.0))
    assert result.p == 3.0 and result.start_loss == 3.0


def test_parabola():
    x = [2.0, 2.5, 3.0, 3.5]
    assert parabola_minimum(x, [(v - 2.8) ** 2 for v in x]) == pytest.approx(2.8)
    assert parabola_minimum(x, [-((v - 2.8) ** 2) for v in x]) is None, "a maximum"
    assert parabola_minimum(x, [(v - 5.1) ** 2 for v in x]) is None, "outside"
    assert parabola_minimum(x, [1.0, float("nan"), 2.0, 3.0]) is None
