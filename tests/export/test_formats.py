"""What each format can hold, and what writers refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import export_builders as builders
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs

from qpipe import ActivationRange
from qpipe.builtin.exporters import Exporters
from qpipe.errors import FormatError
from qpipe.export import compressed
from qpipe.export.compressed import targets
from qpipe.export.packing import pack_bits, pack_trits, packed_width, unpack_bits, unpack_trits
from qpipe.export.record import ActivationSite, PackedWeight, PlannedSite
from qpipe.export.schemes import activation_tensors, centre, lift, weight_tensors
from qpipe.export.verify import changed_environment, compare_logits
from qpipe.quant.tensor import QTensor, code_range


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 33])
def test_bits_round_trip(bits, count):
    low, high = code_range(bits)
    codes = np.random.default_rng(bits).integers(low, high + 1, (5, count))
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, packed_width("bits", bits, count))
    assert np.array_equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_have_the_order_of_compressed_tensors(bits):
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (3, 64), dtype=torch.int8)
    theirs = pack_to_int32(codes, bits).numpy().view(np.uint8)
    assert np.array_equal(pack_bits(codes.numpy(), bits), theirs)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_trits_round_trip(count):
    codes = np.random.default_rng(count).integers(-1, 2, (4, count))
    packed = pack_trits(codes)
    assert packed.shape == (4, packed_width("trits", 2, count))
    assert np.array_equal(unpack_trits(packed, count), codes)


def test_packers_refuse_codes_that_do_not_fit():
    with pytest.raises(FormatError, match="do not fit 3 bits"):
        pack_bits(np.array([[4]]), 3)
    with pytest.raises(FormatError, match="not all of -1, 0, 1"):
        pack_trits(np.array([[2]]))
    with pytest.raises(FormatError, match="1 to 8"):
        pack_bits(np.array([[0]]), 9)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_lift_changes_no_value(bits):
    tensor = builders.midrise(torch.randn(6, 16), bits, "channel")
    assert torch.equal(lift(tensor).decode(), tensor.decode())
    assert lift(tensor).integers().dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_of_a_mid_rise_grid_keep_their_zero_points(dtype):
    """Every code, in the arithmetic of a loader: 127.5 has as many digits as bfloat16 holds."""
    codes = torch.arange(-128, 128).repeat(3, 1).float()
    scale = torch.tensor([[0.01], [0.02], [3.0]]).to(dtype).float()
    tensor = QTensor(codes, scale, torch.full((1,), -0.5), 8)
    scheme, stored = weight_tensors("l", PackedWeight("l", "Linear", tensor, ""), dtype)
    assert (scheme.stored, scheme.bits, scheme.strategy) == ("naive-quantized", 8, "channel")
    assert stored["weight"].dtype == torch.int8 and stored["weight_zero_point"].shape == (3, 1)
    loaded = (stored["weight"].to(dtype) - stored["weight_zero_point"].to(dtype)) * stored["weight_scale"]
    assert torch.equal(loaded, tensor.decode(dtype))


@pytest.mark.parametrize("options", [{}, {"granularity": "group", "group_size": 4}])
def test_centre_changes_no_value_and_needs_at_most_one_bit(options):
    tensor = builders.quantize(torch.rand(6, 16), bits=4, symmetric=False, **options)
    centred = centre(tensor)
    assert torch.equal(centred.decode(), tensor.decode())
    assert centred.bits == 5
    centred.integers()
    narrow = QTensor(torch.tensor([[-2.0, 5.0]]), torch.ones(1, 1), torch.ones(1, 1), 4)
    assert centre(narrow).bits == 4


def test_targets_are_compact_and_anchored():
    names = [f"model.layers.{i}.mlp.up" for i in (0, 2, 10)] + ["head", "model.layers.1.mlp.down"]
    assert targets(names) == [
        "re:^head$",
        r"re:^model\.layers\.(?:0|2|10)\.mlp\.up$",
        r"re:^model\.layers\.1\.mlp\.down$",
    ]


def exporters():
    return {e.name: e for e in Exporters().qpipe_exporters()}


@pytest.mark.parametrize(
    ("site", "word"),
    [
        (PlannedSite("conv", "weight", "Conv2d", 4), "Conv2d"),
        (PlannedSite("l", "weight", "Linear", 4, zero_point="float"), "zero points"),
        (PlannedSite("l", "weight", "Linear", 12), "12 bits"),
        (PlannedSite("attn", "probs", "BertAttention", 8, "token", dynamic=True), "attention"),
        (PlannedSite("norm", "output", "LayerNorm", 8, "tensor", dynamic=True), "whose weight is quantized"),
        (PlannedSite("quantized", "input", "Linear", 8, "token", dynamic=True, clip=2.5), "narrow or clip"),
        (PlannedSite("quantized", "input", "Linear", 8, "token", dynamic=True, narrow=True), "narrow or clip"),
        (PlannedSite("l", "weight", "Linear", 4, dtype=torch.bfloat16), "scale_dtype: auto"),
        (PlannedSite("l", "weight", "Linear", 4, scale_dtype=torch.float16, dtype=torch.bfloat16), "float16 scales"),
        (PlannedSite("quantized", "output", "Linear", 8, "tensor", dtype=torch.bfloat16), "float32 scales"),
    ],
)
def test_check_names_the_site_and_the_way_out(site, word):
    weight = PlannedSite("quantized", "weight", "Linear", 4)
    (reason,) = exporters()["compressed-tensors"].check([site, weight])
    assert reason.startswith(site.name)
    assert word in reason
    assert "native" in reason


def test_check_accepts_what_can_be_held():
    sites = [
        PlannedSite("l", "weight", "Linear", 4, "group", 32, zero_point="integer"),
        PlannedSite("l", "input", "Linear", 8, "token", dynamic=True),
        PlannedSite("l", "output", "Linear", 8, "tensor"),
        PlannedSite("m", "weight", "Linear", 8, "tensor", zero_point="half"),
        PlannedSite("n", "weight", "Linear", 8, zero_point="half"),
        PlannedSite("e", "weight", "Embedding", 2),
        PlannedSite("o", "weight", "Linear", 4, scale_dtype=torch.bfloat16, dtype=torch.bfloat16),
        PlannedSite("p", "weight", "Linear", 4, scale_dtype=torch.bfloat16),
        PlannedSite("q", "weight", "Linear", 4, scale_dtype=torch.float16),
        PlannedSite("o", "input", "Linear", 8, "token", dynamic=True, dtype=torch.bfloat16),
    ]
    assert list(exporters()["compressed-tensors"].check(sites)) == []
    conv = PlannedSite("conv", "weight", "Conv2d", 4)
    coarse = PlannedSite("r", "weight", "Linear", 4, dtype=torch.bfloat16)
    assert list(exporters()["native"].check([*sites, conv, coarse])) == []
    (reason,) = exporters()["native"].check([PlannedSite("l", "weight", "Linear", 9)])
    assert "1 to 8" in reason


def linear_record(tensor=None, dtype=torch.float32, **changes):
    name = "bert.pooler.dense"
    weight = builders.make("bert").get_submodule(name).weight
    return replace(builders.record_of("bert", {name: tensor or builders.quantize(weight, bits=4)}, dtype), **changes)


def refused(record, tmp_path, match):
    with pytest.raises(FormatError, match=match):
        compressed.write(record, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_scales_must_be_representable(tmp_path):
    refused(linear_record(dtype=torch.bfloat16), tmp_path, r"bert\.pooler\.dense\.weight: scale .* bfloat16")


def test_codes_out_of_range_are_refused(tmp_path):
    record = linear_record()
    name = "bert.pooler.dense.weight"
    weight = record.weights[name]
    wide = replace(weight, tensor=replace(weight.tensor, codes=weight.tensor.codes * 9))
    refused(replace(record, weights={name: wide}), tmp_path, "codes must be integers")


def test_hash_must_match_the_codes(tmp_path):
    record = linear_record()
    name = "bert.pooler.dense.weight"
    wrong = {name: replace(record.weights[name], decoded_sha256="0" * 64)}
    refused(replace(record, weights=wrong), tmp_path, "decoded_sha256")


def test_attention_activation_is_refused(tmp_path):
    site = ActivationSite("bert.encoder.layer.0.attention.self", "probs", ActivationRange(8, True, "tensor", True))
    refused(linear_record(activations=[site]), tmp_path, "inside attention")


def test_groups_of_features_are_refused(tmp_path):
    groups = ActivationRange(8, False, "group", False, (0.1, 0.2), (0.0, 1.0), (1, 0))
    site = ActivationSite("bert.pooler.dense", "input", groups)
    refused(linear_record(activations=[site]), tmp_path, "static activation ranges per group do not fit; .*native")
    with pytest.raises(FormatError, match="static activation ranges per group do not fit; use export.format: native"):
        activation_tensors(site, torch.float32)


def test_uncalibrated_static_range_is_refused(tmp_path):
    site = ActivationSite("bert.pooler.dense", "input", ActivationRange(8, False, "tensor", True))
    refused(linear_record(activations=[site]), tmp_path, "calibrated")


def test_reference_is_required(tmp_path):
    refused(linear_record(reference={}), tmp_path, "reference examples")


def test_nothing_quantized_is_refused(tmp_path):
    refused(linear_record(weights={}), tmp_path, "nothing is quantized")


def test_licence_file_and_processor_are_copied(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/LICENSE").write_text("do what you like")

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    record = linear_record(metadata={"base_model": str(tmp_path / "base")}, tokenizer=Tokenizer())
    compressed.write(record, tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "do what you like"
    assert "tokenizer.json" in (tmp_path / "out/SHA256SUMS").read_text()
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


def about(**environment):
    from qpipe.export.companions import environment as here

    return {"dtype": "float32", "activations": [], "environment": {**here(torch.float32), **environment}}


def test_logits_may_differ_by_rounding_only_elsewhere():
    expected = torch.tensor([[1.0, -2.0]])
    near, far = expected + 1e-5, expected + 1e-2
    assert changed_environment(about()) == []
    assert compare_logits(about(), expected, near)[0] == "fail"
    status, detail = compare_logits(about(torch="1.0"), expected, near)
    assert status == "pass"
    assert "allowed 0.0002" in detail
    assert "torch 1.0 ->" in detail
    assert compare_logits(about(torch="1.0"), expected, far)[0] == "fail"
    assert compare_logits(about(torch="1.0"), expected, expected * torch.nan)[0] == "fail"


@pytest.mark.parametrize(
    ("zero", "dtype"), [(-8.0, torch.int8), (127.0, torch.int8), (-1.3, torch.float32), (300.0, torch.float32)]
)
def test_zero_points_of_activations_are_integers_where_they_can_be(zero, dtype):
    site = ActivationSite("l", "input", ActivationRange(4, False, "tensor", False, 0.25, zero))
    pairs, found = activation_tensors(site, torch.bfloat16)
    assert found["input_zero_point"].dtype == dtype and float(found["input_zero_point"]) == pytest.approx(zero)
    assert (dict(pairs).get("zp_dtype") == torch.float32) == (dtype == torch.float32)
    QuantizationArgs(type="int", **dict(pairs))


@pytest.mark.parametrize(
    ("scale", "zero", "message"), [(None, 0.0, "was it calibrated"), (0.25, math.nan, "did the training diverge")]
)
def test_activations_without_a_range_are_refused(scale, zero, message):
    with pytest.raises(FormatError, match=f"l:input .*{message}"):
        given = ActivationRange(4, False, "tensor", False, scale, zero)
        activation_tensors(ActivationSite("l", "input", given), torch.float32)
