"""BertAdam with gradients clipped tensor by tensor, and AdamW with those of the model clipped together, from formulas.

Two processes under each engine and ZeRO stage.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpipe.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))
from steps import FACTORS, STEPS, Net, data

pytestmark = pytest.mark.xdist_group("engines")  # the fixture takes most of the time

LIMIT = 0.1
ENGINES = {
    "zero0": {"name": "deepspeed", "zero": 0},
    "zero1": {"name": "deepspeed", "zero": 1},
    "zero2": {"name": "deepspeed", "zero": 2},
    "zero2-offload": {"name": "deepspeed", "zero": 2, "offload": "optimizer"},
    "zero3": {"name": "deepspeed", "zero": 3},
    "zero3-offload": {"name": "deepspeed", "zero": 3, "offload": "optimizer"},
    "ddp": {"name": "accelerate"},
    "fsdp": {"name": "accelerate", "fsdp": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    train = {"batch_size": 16, "accumulation": 2, "clip": LIMIT, "learning_rate": 0.05}
    cases = {}
    for name, engine in ENGINES.items():
        extra = {"config_file": str(settings)} if engine.get("zero") == 3 else {}
        engine = {**engine, **extra, "cpu": True, "precision": "float32"}
        for optimizer in OPTIMIZERS:
            own = {**train, "optimizer": optimizer}
            cases[f"{name}-{optimizer}"] = {"model": {"name": "none"}, "train": own, "engine": engine}
    run_distributed("steps:write", cases=cases, folder=str(folder))
    return folder


def own_norm(gradients, own):
    return float(own.norm())


def whole_norm(gradients, own):
    return sum(float(g.square().sum()) for g in gradients) ** 0.5


OPTIMIZERS = {"bert-adam": own_norm, "adamw": whole_norm}
"""With the norm that each limits by default."""


def updated(optimizer, p, g, moments, step, decay):
    """A parameter after a step, by the formulas."""
    first, second = moments
    first.copy_(0.9 * first + 0.1 * g)
    second.copy_(0.999 * second + 0.001 * g * g)
    rate = 0.05 / (1 + step)
    if optimizer == "bert-adam":  # no bias correction
        return p - rate * (first / (second.sqrt() + 1e-6) + decay * p)
    mean, variance = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
    return (1 - rate * decay) * p - rate * mean / (variance.sqrt() + 1e-8)


def by_hand(optimizer, limited):
    """The same training in float64 on the whole batch, from the formulas, without qpipe."""
    torch.manual_seed(0)
    net = Net().double()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in net.named_parameters()}
    norms = []
    for step in range(STEPS):
        losses = [FACTORS[step] * net(data(2 * step + micro).double()).square().mean() for micro in range(2)]
        gradients = torch.autograd.grad(sum(losses) / 2, list(net.parameters()))
        norms.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
        for (name, p), gradient in zip(net.named_parameters(), gradients, strict=True):
            g = gradient * min(1.0, LIMIT / (limited(gradients, gradient) + 1e-6))
            decay = 0.01 if name.endswith("weight") else 0.0
            with torch.no_grad():
                p.copy_(updated(optimizer, p, g, moments[name], step, decay))
    return dict(net.named_parameters()), norms


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ENGINES)
def test_two_processes(folder, name, optimizer):
    expected, norms = by_hand(optimizer, OPTIMIZERS[optimizer])
    found = load_file(folder / f"{name}-{optimizer}.safetensors")
    torch.testing.assert_close(found.pop("norms"), torch.tensor(norms), rtol=1e-5, atol=0)
    assert min(norms) > LIMIT, "every step clips"
    for key, weight in expected.items():
        torch.testing.assert_close(
            found[key].double(), weight.detach(), rtol=0, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.distributed
@pytest.mark.parametrize("name", ENGINES)
def test_resumed(folder, name):
    """Moments come back: a run that was interrupted after the second step ends in the same bits."""
    case = f"{name}-bert-adam"
    whole, resumed = (load_file(folder / f"{which}.safetensors") for which in (case, f"{case}-resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.distributed
def test_an_optimizer_has_taken_no_step_before_training():
    """DeepSpeed takes one for bfloat16 without ZeRO."""
    engine = {"name": "deepspeed", "zero": 0, "cpu": True, "precision": "bfloat16"}
    train = {"batch_size": 16, "optimizer": "bert-adam", "learning_rate": 0.05}
    config = {"model": {"name": "none"}, "train": train, "engine": engine}
    found = run_distributed("steps:begin_unmoved", world_size=1, config=config)
    assert found == {"states": 0, "moved": 0, "rate": 0.05, "masters": 6, "parameters": 6}


@pytest.mark.distributed
def test_every_engine_tells_of_gradients_that_are_not_finite():
    cases = {}
    for name, engine in ENGINES.items():
        for precision in ("float32", "bfloat16"):
            for clip in ({"clip": 1.0, "clip_by": "model"}, {"clip": 1.0, "clip_by": "tensor"}):
                full = {**engine, "cpu": True, "precision": precision}
                train = {"batch_size": 16, "accumulation": 2, "optimizer": "bert-adam", **clip}
                key = f"{name} {precision} {clip}"
                cases[key] = {"model": {"name": "none"}, "train": train, "engine": full}
    found = run_distributed("steps:norms_of_nan", cases=cases)
    assert {key: norms for key, norms in found.items() if norms != ["finite", "not finite"]} == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_matters_whose_norm_is_limited(optimizer):
    """Clipping tensor by tensor, all together, or not at all, ends in weights that the tests above tell apart."""
    expected, _ = by_hand(optimizer, OPTIMIZERS[optimizer])
    for norm in (own_norm, whole_norm, lambda gradients, own: 0.0):
        if norm is not OPTIMIZERS[optimizer]:
            other, _ = by_hand(optimizer, norm)
            moved = [float((other[k] - w).detach().abs().max()) for k, w in expected.items() if "unused" not in k]
            assert min(moved) > 2e-5, "ten times what the tests above allow"


@pytest.mark.distributed
def test_gradients_that_cannot_be_reached_are_refused(tmp_path):
    """DeepSpeed keeps whole float32 copies of bfloat16 gradients then, of which it updates from a part."""
    settings = tmp_path / "float32.json"
    settings.write_text(json.dumps({"data_types": {"grad_accum_dtype": "fp32"}}))
    engine = {"name": "deepspeed", "zero": 1, "cpu": True, "precision": "bfloat16", "config_file": str(settings)}
    config = {"model": {"name": "none"}, "train": {"batch_size": 16, "optimizer": "bert-adam"}, "engine": engine}
    assert "engine.zero: 2 or 3" in run_distributed("steps:refused", world_size=1, config=config)
