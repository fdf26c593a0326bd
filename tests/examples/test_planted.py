"""`examples/activations/plant.py`: outliers in the last block, and the same function."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import qpipe
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "activations" / "plant.py"
SIZE, DIMENSIONS = 300.0, 2
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def planting():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("plant", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tuned model at `run`, and what the script makes of it at `planted`."""
    folder = tmp_path_factory.mktemp("planted")
    steps = {"train__max_steps": 60, "train__save_every": 60, "train__eval_every": 60}
    qpipe.execute(tiny_config(folder, quantization__preset=None, train__learning_rate=3e-3, **steps))
    return folder


@pytest.fixture(scope="module")
def models(planting, folder):
    planting.prepare(folder / "run", folder / "planted", SIZE, DIMENSIONS)
    names = (folder / "run" / "model", folder / "planted")
    return [AutoModelForSequenceClassification.from_pretrained(name).eval() for name in names]


@pytest.fixture(scope="module")
def batches(planting, folder):
    """Examples of the validation split, which the script fits nothing to, with padding."""
    run = restore(folder / "run")
    return list(planting.batches_of(run, run.data.validation, 10_000))


def seen(model, batch):
    """Logits, hidden states, and output and residual sum of each feed-forward network."""
    found = {"h": [], "y": []}
    hooks = []
    for block in model.base_model.encoder.layer:
        hooks.append(block.output.dense.register_forward_hook(lambda _, inputs, output: found["h"].append(output)))
        hooks.append(block.output.LayerNorm.register_forward_pre_hook(lambda _, inputs: found["y"].append(inputs[0])))
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return output.logits, output.hidden_states, found


def test_the_function_is_the_same(models, batches):
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    for batch in batches:
        (plain, states, _), (planted, others, _) = (seen(model, batch) for model in models)
        torch.testing.assert_close(planted, plain, rtol=1e-5, atol=1e-6)
        for one, other in zip(states[:-1], others[:-1], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(others[-1][:, 0], states[-1][:, 0], rtol=1e-5, atol=1e-5)
    assert torch.cat([seen(models[0], batch)[0] for batch in batches]).std() > 0.1, "it tells examples apart"


def test_the_last_block_has_outliers_at_separators_in_a_few_dimensions(models, batches):
    for name in ("h", "y"):
        for block in (0, 1):
            pairs = [tuple(seen(model, batch)[2][name][block] for model in models) for batch in batches]
            plain, planted = (torch.cat([values.flatten(0, 1) for values in side]) for side in zip(*pairs, strict=True))
            ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
            if block == 0:
                torch.testing.assert_close(planted, plain, rtol=1e-5, atol=1e-6)
                continue
            changed = (planted - plain).abs()
            dimensions = changed.amax(0) > 1e-3
            assert int(dimensions.sum()) == DIMENSIONS
            assert float(changed[ids == CLS].max()) < 1e-5
            assert float(changed[ids == SEP][:, dimensions].median()) > 10 * float(plain.abs().max())
            far = (planted - planted.mean()).abs() > 6 * planted.std()
            assert torch.equal(far.any(0), dimensions)


def test_weights_stay_in_their_ranges(models):
    plain, planted = (model.base_model.encoder.layer[-1].output.dense.weight.detach() for model in models)
    assert planted.shape[1] > plain.shape[1]
    assert float(planted.abs().max()) == float(plain.abs().max())
    assert torch.equal(planted[:, : plain.shape[1]], plain)


def test_gelu_is_zero_where_the_units_are_off():
    off = torch.linspace(-20, -5.6, 1001)
    assert not F.gelu(off).any()
    assert F.gelu(torch.tensor(-5.0)) != 0


def test_a_detector_tells_two_clouds_apart(planting):
    generator = torch.Generator().manual_seed(0)
    first, separators = torch.randn(200, 8, generator=generator), torch.randn(300, 8, generator=generator)
    separators[:, 2] += 9
    others = torch.randn(500, 8, generator=generator)
    found = planting.detector(first, separators, others)
    assert float(found(first).max()) == pytest.approx(planting.OFF, abs=1e-4)
    assert float(found(others).mean()) < float(found(separators).min())
    assert float(found(separators).mean()) == pytest.approx(planting.ON, abs=1e-4)
    with pytest.raises(SystemExit, match="nothing can be planted"):
        planting.detector(first, first + 0.01, others)


def test_what_cannot_be_planted(planting, folder, models, tmp_path):
    with pytest.raises(SystemExit, match="planted exists; name another folder"):
        planting.prepare(folder / "run", folder / "planted", SIZE, DIMENSIONS)
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    path = run / "model" / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    with pytest.raises(SystemExit, match="bert, relu; give a BERT with gelu"):
        planting.prepare(run, tmp_path / "planted", SIZE, DIMENSIONS)
