"""The recipes of XTC, one after the other, on a tiny model and a few steps."""

from pathlib import Path

import pytest
import torch

import qpipe
from qpipe.config import read_yaml, resolve
from qpipe.testing import tiny_config, tiny_model

RECIPES = Path(__file__).parents[2] / "examples" / "xtc"


def recipe(name, folder):
    """A recipe with its model, data and length replaced."""
    tiny = tiny_config(folder).model_dump(mode="json")
    source = read_yaml((RECIPES / f"{name}.yaml").read_text(), name)
    reduced = folder / "reduced"
    if name == "reduced":
        source["model"]["name"] = str(tiny_model(folder / "deep", num_hidden_layers=4))
        source["teacher"]["epochs"] = 0.2
    else:
        source["model"]["name"] = str(reduced / "model")
        source["teacher"]["name"] = str(reduced / "teacher" / "model")
    source["data"] |= {key: tiny["data"][key] for key in ("train", "max_length", "validation_fraction")}
    source["train"] |= {"max_steps": 2, "batch_size": 16}
    return resolve(source | {"engine": tiny["engine"], "out": str(folder / name)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xtc")
    run = qpipe.execute(recipe("reduced", folder))
    assert len(run.teacher.bert.encoder.layer) == 4 and len(run.student.bert.encoder.layer) == 2
    return folder


@pytest.mark.parametrize(("name", "levels"), [("w1a8", 2), ("w2a8", 3)])
def test_the_second_step_quantizes_the_reduced_model(name, levels, folder):
    run = qpipe.execute(recipe(name, folder))
    assert run.results["verified"] and len(run.student.bert.encoder.layer) == 2
    weights = {site: q for site, q in run.instruments.quantizers().items() if site.endswith(":weight")}
    assert len(weights) == 2 * 6 + 1
    for site, quantizer in weights.items():
        weight = run.student.get_submodule(site.rpartition(":")[0]).weight
        value = quantizer.quantize(weight.detach())
        rows = value if "embeddings" in site else value.reshape(1, -1)
        assert max(len(row.unique()) for row in rows) == levels, site
    inputs = {site: q for site, q in run.instruments.quantizers().items() if site.endswith(":input")}
    assert {site.removesuffix(":input") + ":weight" for site in inputs} == {s for s in weights if "embeddings" not in s}
    for site, quantizer in inputs.items():
        x = torch.randn(2, 5, run.student.get_submodule(site.rpartition(":")[0]).in_features)
        x[0, 0] *= 100
        steps = (x.amax(-1) - x.amin(-1)) / 255
        error = (quantizer(x) - x).abs().amax(-1)
        assert bool((error <= steps).all() and (error > steps / 10).all()), f"{site}: 8 bits for each token"
    assert {"distillation/logits", "distillation/hidden", "distillation/attention"} <= {
        loss.name for loss in run.host.collect("qpipe_losses", run=run).values()
    }
