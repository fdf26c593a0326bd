import pytest
import torch

from qpipe import QTensor, SiteError
from qpipe.quant.tensor import code_range, grouped


@pytest.mark.parametrize(("bits", "expected"), [(1, (-1, 0)), (2, (-2, 1)), (4, (-8, 7)), (8, (-128, 127))])
def test_code_range(bits, expected):
    assert code_range(bits) == expected


def test_decode_per_channel_is_one_subtraction_and_one_product():
    codes = torch.tensor([[-8, 0, 7], [1, 2, 3]])
    tensor = QTensor(codes, torch.tensor([[0.5], [3.0]]), torch.tensor([[-2.0], [1.0]]), 4)
    assert tensor.decode().tolist() == [[-3.0, 1.0, 4.5], [0.0, 3.0, 6.0]]
    assert tensor.granularity == "channel"


def test_decode_per_tensor_and_half_integer_zero_points():
    tensor = QTensor(torch.tensor([[-1, 0]]), torch.tensor([[2.0]]), torch.tensor([-0.5]), 1)
    assert tensor.decode().tolist() == [[-1.0, 1.0]]
    assert tensor.granularity == "tensor"


def test_decode_per_group_of_a_convolution():
    codes = torch.arange(-8, 8).view(2, 2, 2, 2)
    scale = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]])
    tensor = QTensor(codes, scale, torch.zeros(1), 5, group_size=4)
    assert tensor.granularity == "group"
    assert tensor.decode().flatten().tolist() == [
        *(-8.0, -7.0, -6.0, -5.0, -40.0, -30.0, -20.0, -10.0),
        *(0.0, 100.0, 200.0, 300.0, 4000.0, 5000.0, 6000.0, 7000.0),
    ]


def test_decode_rounds_once_in_the_target_type():
    codes, scale = torch.arange(-128, 128).view(1, -1), torch.tensor([[0.1]])
    decoded = QTensor(codes, scale, torch.zeros(1), 8).decode(torch.bfloat16)
    assert torch.equal(decoded, (codes * scale).bfloat16())
    assert not torch.equal(decoded, codes.bfloat16() * scale.bfloat16())


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.int8), (8, torch.int8), (9, torch.int16)])
def test_integers(bits, dtype):
    low, high = code_range(bits)
    tensor = QTensor(torch.tensor([float(low), 0.0, float(high)]), torch.ones(1), torch.zeros(1), bits)
    assert tensor.integers().dtype == dtype
    assert tensor.integers().tolist() == [low, 0, high]


@pytest.mark.parametrize("code", [0.5, 8.0, -9.0, float("nan")])
def test_integers_refuses_what_is_no_code(code):
    tensor = QTensor(torch.tensor([1.0, code]), torch.ones(1), torch.zeros(1), 4)
    with pytest.raises(ValueError, match=r"integers in \[-8, 7\] for 4 bits"):
        tensor.integers()


def test_bits_per_weight_counts_scales_and_zero_points_that_vary():
    codes = torch.zeros(4, 64)
    channel = QTensor(codes, torch.ones(4, 1), torch.zeros(1), 4)
    assert channel.bits_per_weight() == 4 + 32 * 4 / 256
    assert channel.bits_per_weight(16) == 4 + 16 * 4 / 256
    asymmetric = QTensor(codes, torch.ones(4, 1), torch.zeros(4, 1), 4)
    assert asymmetric.bits_per_weight() == 4 + 32 * 8 / 256
    group = QTensor(codes, torch.ones(4, 4, 1), torch.zeros(1), 3, 16)
    assert group.bits_per_weight(16) == 3 + 16 * 16 / 256


def test_grouped():
    value = torch.arange(24).view(2, 3, 4)
    assert grouped(value, None) is value
    assert grouped(value, 6).tolist() == value.view(2, 2, 6).tolist()
    with pytest.raises(SiteError, match="group size 5 does not divide the 12 elements of a channel"):
        grouped(value, 5)
