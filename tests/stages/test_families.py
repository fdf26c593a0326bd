"""Every family goes through the whole run, and its export verifies without qpipe."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import qpipe
from qpipe import ConfigError, FormatError, SiteError
from qpipe.analysis.analyze import Request, analyze
from qpipe.config import resolve
from qpipe.export.inspect import sizes, stored_bytes
from qpipe.export.verify import verify_all
from qpipe.host import load_plugins
from qpipe.stages import evaluate_run, plan_run
from qpipe.stages.initialize import initialize
from qpipe.stages.quantize import _prepared
from qpipe.stages.sensitivity import load
from qpipe.stages.sizes import fixed_size
from qpipe.stages.trained import restore
from qpipe.testing import tiny_model, tiny_text_data
from qpipe.testing.tiny import FAMILIES, tiny_images, tiny_lines

from .conftest import EXECUTE, no_verification

STEPS = 2
MODELS = (*FAMILIES, "llama-tied", "qwen3-tied")
"""Families, and those whose output head shares the embedding's weight."""


def config_of(name: str, folder: Path, **sizes):
    family, _, tied = name.partition("-")
    model = tiny_model(folder / name, family, **sizes, **({"tie_word_embeddings": True} if tied else {}))
    if family in ("vit", "resnet"):
        task, data = "image-classification", {"train": str(tiny_images(folder / f"{family}.parquet"))}
    elif family in ("llama", "qwen3"):
        task, data = "causal-lm", {"train": str(tiny_lines(folder / f"{family}.jsonl")), "max_length": 16}
    else:
        data = {"train": str(tiny_text_data(folder / f"{family}.jsonl", 60)), "max_length": 16}
        task = "sst2"
    rules = [{"site": "*embeddings:weight", "options": {"bits": 8}}]
    if family == "resnet":
        rules = [{"site": "*convolution:weight", "options": {"bits": 4}}, {"site": "classifier.1:weight"}]
    elif tied:
        rules = []  # the embedding's rule holds for the head
    elif family in ("vit", "llama", "qwen3"):
        rules = [{"site": "{head}:weight", "options": {"bits": 8, "symmetric": False}}]
    config = {
        "model": {"name": str(model)},
        "task": task,
        "data": {**data, "validation_fraction": 0.2},
        "quantization": {"preset": None if family in ("resnet", "vit") else "w4a8", "rules": rules},
        "train": {"max_steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1},
        "engine": {"name": "accelerate", "precision": "float32", "cpu": True},
        "export": {"format": "native" if family == "resnet" else "compressed-tensors"},
        "out": str(folder / f"run-{name}"),
    }
    if family == "vit":
        config["quantization"]["rules"] += [
            {"site": "{block}.*:weight", "options": {"bits": 4, "granularity": "group", "group_size": 16}},
            {"site": "{block}.*:input", "quantizer": "uniform-activation", "options": {"granularity": "tensor"}},
        ]
    return resolve(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of every family."""
    patch = pytest.MonkeyPatch()
    patch.setattr(EXECUTE, "verify", no_verification)
    folder = tmp_path_factory.mktemp("families")
    found = {family: qpipe.execute(config_of(family, folder)) for family in MODELS}
    patch.undo()
    return found


@pytest.fixture(scope="module")
def verified(runs):
    folders = {family: run.out / "export" for family, run in runs.items()}
    return dict(zip(folders, verify_all(list(folders.values())), strict=True))


@pytest.mark.parametrize("family", MODELS)
def test_trains_and_exports(family, runs):
    run = runs[family]
    assert run.results["steps"] == STEPS
    assert run.results["self_check"]["max_logit_change"][0] > 0
    folders = Path(run.config.model.name), run.out / "model"
    names = [load_file(folder / "model.safetensors").keys() for folder in folders]
    assert names[0] == names[1], "the trained model is an ordinary checkpoint"
    start, end = (type(run.student).from_pretrained(folder) for folder in folders)
    for name in run.plan.sites:
        path, _, slot = name.rpartition(":")
        if slot == "weight":
            weights = start.get_submodule(path).weight, end.get_submodule(path).weight
            assert not torch.equal(*weights), f"{name} did not train"


@pytest.mark.parametrize("family", MODELS)
def test_every_planned_weight_is_packed(family, runs):
    run = runs[family]
    planned = {n.removesuffix(":weight") + ".weight" for n in run.plan.sites if n.endswith(":weight")}
    assert planned == {entry["name"] for entry in json.loads((run.out / "tensors.json").read_text())}
    size = run.results["size"]
    assert size, "no sizes are reported"


@pytest.mark.parametrize("family", MODELS)
def test_the_export_verifies_without_qpipe(family, verified):
    result = verified[family]
    assert result.passed, "\n".join(result.lines())


@pytest.mark.parametrize("family", MODELS)
def test_the_reloaded_model_has_the_metrics_of_training(family, verified, runs):
    metrics, expected = verified[family].metrics, runs[family].results["evaluation"]
    assert metrics.keys() == expected.keys() and metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_the_restored_run_has_the_metrics_of_training(family, runs):
    assert evaluate_run(runs[family].out) == runs[family].results["evaluation"]


@pytest.mark.parametrize("family", MODELS)
def test_the_size_of_the_export_is_predicted(family, runs):
    export = runs[family].out / "export"
    size, real, data = fixed_size(restore(runs[family].out), []), sizes(export), sum(stored_bytes(export).values())
    assert size.weights == real["quantized_parameters"]
    assert 8 * size.quantized / size.weights == pytest.approx(real["quantized_bits_per_weight"], abs=1e-9)
    assert size.quantized + size.other == data
    assert real["file_bytes"] - data <= size.header


def test_a_format_that_cannot_hold_the_plan_is_refused_before_training(tmp_path):
    config = config_of("resnet", tmp_path)
    config = config.model_copy(update={"export": config.export.model_copy(update={"format": "compressed-tensors"})})
    with pytest.raises(FormatError, match=r"'compressed-tensors' cannot hold this plan: .*convolution.*native"):
        plan_run(config)


def test_two_rules_for_one_tied_parameter(tmp_path):
    config = config_of("llama", tmp_path, tie_word_embeddings=True)
    with pytest.raises(
        SiteError, match="lm_head:weight and model.embed_tokens:weight are one tied parameter; exclude one"
    ):
        plan_run(config)


@pytest.mark.parametrize("site", ["{embedding}:weight", "{head}:weight"])
def test_a_tied_weight_whose_quantizer_has_parameters(site, tmp_path):
    """One quantizer, hosted by two modules, whichever of them the rule names: it trains, exports and verifies."""
    config = config_of("llama-tied", tmp_path)
    rules = [{"site": site, "quantizer": "lsq", "options": {"bits": 8}}]
    run = qpipe.execute(resolve({**config.model_dump(mode="json"), "quantization": {"rules": rules}}))
    assert run.results["verified"]
    assert evaluate_run(run.out) == run.results["evaluation"]


def test_a_model_of_an_unknown_family_says_what_to_write(tmp_path):
    """DeBERTa has no attention that qpipe knows, so `{block}` stands for nothing; plain paths work."""
    config = config_of("deberta", tmp_path)
    with pytest.raises(SiteError, match=r"rule '\{block\}.\*:weight': this model has no block .* write module paths"):
        plan_run(config)
    rules = [{"site": "deberta.encoder.layer.*:weight", "options": {"bits": 4}}]
    plain = resolve({**config.model_dump(mode="json"), "quantization": {"rules": rules}})
    # Linear layers of two blocks; the relative embedding is none of them.
    assert len(plan_run(plain).plan.sites) == 12


def test_images_are_prepared_as_they_were(tmp_path, monkeypatch):
    """A finished run keeps its image processor, and one that goes on notices another."""
    monkeypatch.setattr(EXECUTE, "verify", no_verification)
    config = config_of("vit", tmp_path)
    processor = hf.ViTImageProcessorPil(image_mean=[0.1] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "processor")
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"tokenizer": str(tmp_path / "processor")})}
    )
    run = qpipe.execute(config)
    processor.image_mean = [0.5] * 3
    processor.save_pretrained(tmp_path / "processor")
    before, after = (r.data.collate([r.data.validation[0]])["pixel_values"] for r in (run, restore(run.out)))
    assert torch.equal(before, after)
    with pytest.raises(ConfigError, match=r"model.processor .*processor.* has changed since the checkpoint"):
        qpipe.execute(config, resume=True)


def test_images_meet_the_weights_that_data_initialise(tmp_path):
    """Under DeepSpeed in bfloat16 too: before training weights are in float32 there, and images must be."""
    config = config_of("resnet", tmp_path).model_dump(mode="json")
    ptq = {"weights": "adaround", "bias_correction": True, "examples": 16, "batch_size": 8, "iterations": 5}
    config["quantization"]["ptq"] = ptq
    run = _prepared(resolve(config), load_plugins({}))
    run.engine.dtype = torch.bfloat16
    initialize(run)
    assert len(run.results["ptq"]["layers"]) == sum(site.endswith("convolution:weight") for site in run.plan.sites) + 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "resnet"])
def test_convergence_is_measured_on_every_family_of_transformers(family, runs, tmp_path):
    parts = ("layers", "ranking", "attention", "hessian", "landscape")
    teacher = str(tiny_model(tmp_path / "teacher", family, seed=1))
    request = Request(parts, examples=4, sequences=2, points=3, eigenvalues=1, teacher=teacher)
    run = load(runs[family].out)
    run.config = run.config.model_copy(update={"out": str(tmp_path / "run")})
    found = analyze(run, request)
    blocks = len(run.instruments.map.blocks)
    for kind, layers in (("hidden_states", blocks + 1), ("attention_output", blocks), ("ffn_input", blocks)):
        errors = found["layers"][kind]["mse"]
        assert len(errors) == layers and all(0 < error < math.inf for error in errors), kind
    heads = [[len(layer) for layer in found[part][what]] for part, what in (("ranking", "loss"), ("attention", "maps"))]
    assert heads[0] == heads[1] and len(heads[0]) == blocks and min(heads[0]) > 1
    assert all(0 < value < math.inf for layer in found["ranking"]["loss"] for value in layer)
    values = [entry["value"] for batch in found["hessian"]["batches"] for entry in batch]
    assert values and all(math.isfinite(value) and value for value in values)
    losses = found["landscape"]["losses"]
    assert [len(row) for row in losses] == [3, 3, 3] and len({value for row in losses for value in row}) == 9
