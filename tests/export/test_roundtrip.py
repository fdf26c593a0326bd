"""What is exported is what was trained, in a fresh process without qpipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import qpipe.export
from qpipe import ActivationRange
from qpipe.export.card import render
from qpipe.export.folder import read_json
from qpipe.export.inspect import describe, sizes
from qpipe.export.native import load_native, read_native
from qpipe.export.record import ActivationSite

FAMILIES = [
    "bert",
    "distilbert",
    "roberta",
    "vit",
    "llama",
    "qwen3",
    "qwen3-tied",
    "qwen3-asymmetric",
    "native-vit",
    "native-bert",
    "native-resnet",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_logits_are_exact(verified, name):
    result = verified[name]
    text = "\n".join(result.lines())
    assert result.passed, text
    assert "difference exactly 0" in next(c.detail for c in result.checks if c.name == "weights"), text
    assert "difference exactly 0" in next(c.detail for c in result.checks if c.name == "logits"), text


def test_qpipe_is_hidden_from_the_fresh_process(tmp_path):
    script = Path(qpipe.export.__file__).with_name("_fresh.py")
    jobs = tmp_path / "jobs.json"
    jobs.write_text("[]")
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__'); import qpipe.errors"
    words = [sys.executable, "-c", code, str(jobs), str(tmp_path / "results.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (tmp_path / "results.json").read_text() == "[]"
    assert done.returncode == 1
    assert "qpipe is hidden" in done.stderr


def test_changed_logits_fail(verified):
    result = verified["wrong-logits"]
    assert not result.passed
    assert [c.name for c in result.checks if c.status == "fail"] == ["logits"]


def test_config_has_no_implementation_details(exported):
    config = json.loads((exported["bert"] / "config.json").read_text())
    assert not [key for key in config if key.startswith("_")]
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["dtype"] == "float32"
    quantization = config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert all(
        t.startswith("re:^") and t.endswith("$") for g in quantization["config_groups"].values() for t in g["targets"]
    )


def test_each_target_matches_its_modules_only(exported, records):
    config = json.loads((exported["bert"] / "config.json").read_text())["quantization_config"]
    patterns = [t.removeprefix("re:") for g in config["config_groups"].values() for t in g["targets"]]
    modules = [n for n, _ in records["bert"].model.named_modules()]
    matched = [n for p in patterns for n in modules if re.match(p, n)]
    assert sorted(matched) == sorted(w.module for w in records["bert"].weights.values())


def test_true_one_bit_binary(exported):
    rows = {r["module"]: r for r in describe(exported["roberta"])}
    row = rows["roberta.encoder.layer.0.attention.self.query"]
    assert row["bits"] == 1
    assert row["bytes"] == 32 * 32 // 8 + 16 + 4 + 4  # codes, shape, scale, zero point


def test_large_models_are_sharded(exported):
    index = json.loads((exported["llama"] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sizes(exported["llama"])["file_bytes"] > 0


def test_tied_head_is_stored_with_the_codes_of_the_embedding(exported):
    config = json.loads((exported["qwen3"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    about = json.loads((exported["qwen3"] / "qpipe.json").read_text())
    assert about["weights"]["lm_head.weight"]["sha256"] == about["weights"]["model.embed_tokens.weight"]["sha256"]
    assert about["untied"] == ["lm_head.weight"]


def test_card_names_licence_result_and_requirement(exported):
    card = (exported["qwen3"] / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "compressed-tensors>=0.18" in card
    assert "| accuracy | 0.5000 |" in card
    assert "`x` 1.0" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


@pytest.mark.parametrize(
    ("recorded", "how", "tags"),
    [
        ({"steps": 6}, "by quantization-aware training with qpipe", ["quantization-aware-training"]),
        ({"steps": 0}, "without training, with qpipe", ["post-training-quantization"]),
        ({}, "with qpipe", []),
    ],
)
def test_card_says_whether_anything_was_trained(exported, recorded, how, tags):
    about = read_json(exported["qwen3"] / "qpipe.json")
    card = render({**about, **recorded}, has_licence_file=False)
    assert f"\nQuantized from `tiny/qwen3` for task `demo` {how} " in card
    listed = "".join(f"- {tag}\n" for tag in ("qpipe", *tags, "compressed-tensors"))
    assert f"\ntags:\n{listed}---\n" in card


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (ActivationRange(8, True, "token", True), "none"),
        (ActivationRange(8, True, "token", False), "integer"),
        (ActivationRange(8, True, "token", False, narrow=True), "float"),
        (ActivationRange(8, True, "token", True, narrow=True), "none"),
        (ActivationRange(8, False, "tensor", False, 0.5, -7.0), "integer"),
        (ActivationRange(8, False, "tensor", False, 0.5, 0.0), "integer"),
        (ActivationRange(8, False, "tensor", False, 0.5), "integer"),
        (ActivationRange(8, False, "tensor", False, 0.5, -7.25), "float"),
        (ActivationRange(8, False, "group", False, (0.5, 0.1), (3.0, -7.0), (0, 1)), "integer"),
        (ActivationRange(8, False, "group", False, (0.5, 0.1), (3.0, -7.5), (0, 1)), "float"),
    ],
)
def test_card_names_the_zero_points_of_activations(exported, given, kind):
    about = read_json(exported["qwen3"] / "qpipe.json")
    site = json.loads(json.dumps(ActivationSite("m", "output", given).record()))
    card = render({**about, "activations": [site]}, has_licence_file=False)
    extent = f"{'dynamic' if given.dynamic else 'static'}, per {given.granularity}"
    assert f"| 1 | output | 8 | {extent} | {kind} |" in card


def test_sha256sum_agrees(exported):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=exported["vit"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sizes_count_scales(exported):
    found = sizes(exported["vit"])
    assert found["file_bytes"] == os.path.getsize(exported["vit"] / "model.safetensors")
    assert found["full_precision_bytes"] == 4 * found["parameters"]
    assert 2 < found["quantized_bits_per_weight"] < 9
    total = sum(r["bytes"] for r in describe(exported["vit"]))
    assert found["bits_per_weight"] == pytest.approx(8 * total / found["parameters"])


@pytest.mark.parametrize("name", ["native-vit", "native-bert", "native-resnet"])
def test_native_reads_back_exactly(exported, records, name):
    found = read_native(exported[name])
    record = records[name]
    assert set(found) == {*record.weights, *record.tensors}
    for key, weight in record.weights.items():
        assert torch.equal(found[key], weight.tensor.decode()), key


@pytest.mark.parametrize("name", ["native-vit", "native-bert", "native-resnet"])
def test_documented_reader(exported, records, name, request):
    text = (request.config.rootpath / "docs/format.md").read_text()
    scope = {"json": json, "np": np, "safe_open": safe_open}
    exec("import math\n" + text.split("```python\n")[1].split("```")[0], scope)
    for key, weight in records[name].weights.items():
        value = scope["read"](exported[name], key)
        assert value.dtype == np.float32
        assert np.array_equal(value, weight.tensor.decode().numpy()), key


def test_ternary_takes_a_fifth_of_a_byte(exported):
    rows = {r["module"]: r for r in describe(exported["native-bert"])}
    row = rows["bert.encoder.layer.0.output.dense"]  # 32 rows of 64 codes: 13 bytes each, and a scale
    assert row["format"] == "trits"
    assert row["bytes"] == 32 * (13 + 4)


def test_native_is_not_mistaken_for_a_plain_checkpoint(exported):
    from transformers import AutoModelForImageClassification

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(exported["native-vit"])
    assert load_native(exported["native-vit"]).config.model_type == "vit"
