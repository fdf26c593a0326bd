import math

import pytest
import torch

from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.errors import FormatError
from qpipe.quant.tensor import QTensor
from qpipe.report import statistics
from qpipe.report.statistics import histogram, kurtosis, sqnr_db, weight_statistics


def lattice(values: list[float], bits: int = 4) -> QTensor:
    return QTensor(torch.tensor(values), torch.ones(1), torch.zeros(1), bits)


def test_sqnr_of_known_signal_and_noise():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)


def test_sqnr_is_none_without_error_and_without_signal():
    assert sqnr_db(torch.ones(3), torch.ones(3)) is None
    assert sqnr_db(torch.zeros(3), torch.ones(3)) is None


def test_kurtosis_of_known_distributions():
    assert kurtosis(torch.linspace(-1, 1, 100_001, dtype=torch.float64)) == pytest.approx(1.8, abs=1e-3)
    assert kurtosis(torch.tensor([1.0, -1.0])) == pytest.approx(1.0)
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(normal) == pytest.approx(3.0, abs=0.05)


def test_kurtosis_of_small_shifted_weights_keeps_precision():
    weight = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    assert kurtosis(5 + 1e-4 * weight) == pytest.approx(kurtosis(weight), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-8, 3e5])
def test_kurtosis_of_a_constant_is_none(value):
    assert kurtosis(torch.full((1001,), value)) is None


def test_histogram_counts_every_weight_between_smallest_and_largest():
    made = histogram(torch.tensor([0.0, 0.1, 0.5, 1.0]), bins=4)
    assert made == {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": [2, 0, 1, 1]}
    assert sum(histogram(torch.full((7,), 2.0))["counts"]) == 7


def test_chunks_give_the_same_statistics(monkeypatch):
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
    quantized = UniformWeight(UniformOptions(bits=4)).encode(weight)
    whole = weight_statistics(weight, quantized)
    monkeypatch.setattr(statistics, "CHUNK", 50)
    pieces = weight_statistics(weight, quantized)
    assert pieces["sqnr_db"] == pytest.approx(whole["sqnr_db"], rel=1e-12)
    assert pieces["kurtosis"] == pytest.approx(whole["kurtosis"], rel=1e-12)
    assert pieces["histogram"] == whole["histogram"]
    assert pieces["code_counts"] == whole["code_counts"]


def test_weight_statistics_of_a_quantized_weight():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    quantized = UniformWeight(UniformOptions(bits=4)).encode(weight)
    made = weight_statistics(weight, quantized)
    assert (made["bits"], made["granularity"], made["shape"]) == (4, "channel", [16, 64])
    noise = (weight - quantized.decode()).double().square().sum()
    assert made["sqnr_db"] == pytest.approx(10 * math.log10(weight.double().square().sum() / noise))
    assert len(made["histogram"]["edges"]) == 65
    assert sum(made["histogram"]["counts"]) == sum(made["code_counts"].values()) == weight.numel()
    assert all(-8 <= int(code) <= 7 for code in made["code_counts"])


def test_code_counts_hold_codes_that_occur():
    assert weight_statistics(torch.ones(5), lattice([-1.0, 0, 0, 1, 1], 2))["code_counts"] == {"-1": 1, "0": 2, "1": 2}
    assert weight_statistics(torch.ones(2), lattice([300.0, 1], 16))["code_counts"] is None


def test_bad_weights_are_refused():
    with pytest.raises(FormatError, match=r"shape \(2,\) has codes of shape \(3,\)"):
        weight_statistics(torch.ones(2), lattice([1.0, 1, 1]))
    with pytest.raises(FormatError, match="NaN or infinity"):
        weight_statistics(torch.tensor([1.0, math.nan]), lattice([1.0, 1]))
    with pytest.raises(FormatError, match="empty"):
        weight_statistics(torch.ones(0), lattice([]))
