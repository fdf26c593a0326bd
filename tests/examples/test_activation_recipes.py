"""The recipes of quantization-aware training with learned ranges go the whole way, to a verified export."""

import json
from pathlib import Path

import pytest

import qpipe
from qpipe.config.yaml_text import read_yaml
from qpipe.testing import tiny_config

RECIPES = Path(__file__).parents[2] / "examples" / "activations"


@pytest.mark.parametrize(
    ("name", "weights", "embedding"), [("qat-w8a8", 8, 8), ("qat-w4a8", 4, 4), ("qat-w4a8-e2", 4, 2)]
)
def test_every_weight_and_activation_is_trained_exported_and_verified(tmp_path, name, weights, embedding):
    recipe = read_yaml((RECIPES / name / "recipe.yaml").read_text(), name)
    settings = {f"quantization__{key}": value for key, value in recipe["quantization"].items()}
    settings |= {"export__format": recipe["export"]["format"], "train__clip_by": recipe["train"]["clip_by"]}
    run = qpipe.execute(tiny_config(tmp_path, **settings))
    assert run.results["verified"] and run.results["reloaded"] == run.results["evaluation"]
    packed = json.loads((run.out / "export" / "quantization.json").read_text())
    bits = {path: entry["bits"] for path, entry in packed["weights"].items()}
    norms = {path for path in bits if path.endswith("LayerNorm.weight")}
    words = "bert.embeddings.word_embeddings.weight"
    expected = {path: 8 if path in norms else embedding if path == words else weights for path in bits}
    assert len(norms) == 5 and words in bits and bits == expected
    assert [entry["bits"] for entry in packed["activations"]] == [8] * 31
