"""Every family learns from a teacher of its kind: what is compared, and which scores get a gradient."""

from itertools import islice

import pytest
import torch

from qpipe import Step
from qpipe.config import resolve
from qpipe.host import load_plugins
from qpipe.stages.calibrate import calibrate, to_device
from qpipe.stages.execute import assemble
from qpipe.stages.train import collect_losses, micro_step, steps_from
from qpipe.testing import tiny_model, tiny_text_data
from qpipe.testing.tiny import tiny_images, tiny_lines

FAMILIES = ("bert", "roberta", "ernie", "distilbert", "vit", "llama", "qwen3")
EVERYTHING = {"logits": "kl", "hidden": "mse", "attention": "mse", "output": "mse"}
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
"""The first layer sees every earlier token, the second the last three."""


def first_step(folder, family, options, sizes, **train):
    """A run and its first step, after the backward pass; the teacher has other random weights."""
    if family == "vit":
        task, data = "image-classification", {"train": str(tiny_images(folder / "images.parquet"))}
    elif family in ("llama", "qwen3"):
        task, data = "causal-lm", {"train": str(tiny_lines(folder / "lines.jsonl")), "max_length": 16}
    else:
        task, data = "sst2", {"train": str(tiny_text_data(folder / "text.jsonl")), "max_length": 16}
    models = [tiny_model(folder / f"{family}-{seed}", family, seed, initializer_range=0.2, **sizes) for seed in (0, 1)]
    config = resolve(
        {
            "model": {"name": str(models[0])},
            "teacher": {"name": str(models[1]), "init_student": False},
            "task": task,
            "data": {**data, "validation_fraction": 0.2},
            "quantization": {"rules": [{"site": "{block}.*:weight", "quantizer": "ternary-twn"}]},
            "train": {"max_steps": 2, "batch_size": 8, "dropout": 0.0, **train},
            "engine": {"name": "accelerate", "precision": "float32", "cpu": True},
            "export": {"format": "native"},
            "plugins": {"distillation": options, "ternary-twn": {}},
            "out": str(folder / "run"),
        }
    )
    run = assemble(config, load_plugins(config.plugins), {})
    calibrate(run)
    losses = collect_losses(run)
    run.student.train()
    ((index, (batch,)),) = islice(steps_from(run, 0), 1)
    step = Step(index, True, to_device(batch, run))
    kept = keep_gradients(run)
    parts = micro_step(run, step, losses)
    run.engine.close()
    return run, step, parts, kept


def keep_gradients(run):
    """The student's scores by layer; they will have the gradient of the whole loss."""
    kept = []

    def keep(x):
        x.retain_grad()
        kept.append(x)
        return x

    for path in run.instruments.map.attention:
        run.instruments.add_tap(f"{path}:scores", 0, keep)
    return kept


@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize(
    ("family", "sizes"), [*((family, {}) for family in FAMILIES), ("qwen3", WINDOW)], ids=[*FAMILIES, "qwen3-window"]
)
def test_scores_that_no_query_sees_have_no_gradient(family, sizes, padding, tmp_path):
    """No padded keys, no later ones, none outside a sliding window; all others learn."""
    options = {**EVERYTHING, "padding": padding}
    run, step, parts, kept = first_step(tmp_path, family, options, sizes)
    names = {f"distillation/{name}" for name in ("logits", "hidden", "attention", "output")}
    assert parts.keys() == {"task", *names} and all(float(parts[name].detach()) > 0 for name in names)
    mask = step.batch.get("attention_mask")
    for layer, scores in enumerate(kept):
        gradient, tokens = scores.grad, scores.shape[-1]
        expected = torch.ones(len(scores), 1, tokens, tokens, dtype=torch.bool)
        if family != "vit":
            expected &= mask.bool()[:, None, None]
        if family in ("llama", "qwen3"):
            expected &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if sizes and layer == 1:
            expected &= torch.ones(tokens, tokens, dtype=torch.bool).triu(-2)
        counted = expected
        if family != "vit" and padding == "exclude":
            counted = expected & mask.bool()[:, None, :, None]
        assert not bool(gradient.masked_select(~expected).any()), f"layer {layer} learns scores that it never uses"
        assert bool((gradient != 0).masked_select(counted).float().mean() > 0.99), layer
    assert run.teacher is not None and all(p.grad is None for p in run.teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_have_the_same_gradients(family, tmp_path):
    found = []
    for recompute in (False, True):
        run, *_ = first_step(tmp_path, family, EVERYTHING, {}, activation_checkpointing=recompute)
        assert recomputes(run.student) == recompute
        found.append({name: p.grad for name, p in run.student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def recomputes(model):
    """True if its blocks were told to compute their activations again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
