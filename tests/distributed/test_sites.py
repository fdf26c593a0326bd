"""Every activation site of a model that normalises last, and of one that normalises first, under ZeRO-3 and FSDP2."""

import json
import random

import pytest
from safetensors.torch import load_file

from qpipe.testing import run_distributed, tiny_config, tiny_model
from qpipe.testing.gradients import compare, write_traces
from qpipe.testing.tiny import OTHER

STEPS = 2
CASES = ("zero3", "zero3-recomputing", "fsdp-recomputing")
# Two blocks of 13 (gated: 15) sites, five (three) around them.
SITES = {"bert": 2 * 13 + 5, "llama": 2 * 15 + 3}

pytestmark = pytest.mark.xdist_group("zero")


def lines(path):
    rng = random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(OTHER, k=12))}) + "\n" for _ in range(80)))
    return str(path)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    tiny_config(folder)
    shared = {
        "quantization__preset": "w8a8-outputs",
        "export__format": "native",
        "train__max_steps": 4,
        "train__learning_rate": 1e-12,  # so that both steps are compared on equal weights
        "data__max_train_examples": 64,
        "quantization__calibration_batch_size": 8,  # else a batch is that of the one process, here of two sizes
    }
    models = {
        "bert": {},
        "llama": {
            "model__name": str(tiny_model(folder / "llama", "llama")),
            "task": "causal-lm",
            "data__train": lines(folder / "lines.jsonl"),
        },
    }
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    cases = {}
    for family, changes in models.items():
        config = tiny_config(folder, **shared, **changes).model_dump(mode="json")
        # Micro-batches as large as those of two processes, so that no matrix product rounds otherwise.
        one = {**config, "train": {**config["train"], "accumulation": 2}}
        write_traces({f"{family}-one": one}, STEPS, str(folder))
        zero3 = {**config["engine"], "name": "deepspeed", "zero": 3, "config_file": str(settings)}
        recomputing = {**config["train"], "activation_checkpointing": True}
        fsdp = {**config["engine"], "fsdp": True}
        cases[f"{family}-zero3"] = {**config, "engine": zero3}
        cases[f"{family}-zero3-recomputing"] = {**config, "engine": zero3, "train": recomputing}
        cases[f"{family}-fsdp-recomputing"] = {**config, "engine": fsdp, "train": recomputing}
    run_distributed("qpipe.testing.gradients:write_traces", cases=cases, steps=STEPS, folder=str(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", SITES)
def test_every_site_equals_one_process(traces, family, case):
    one = load_file(traces / f"{family}-one.safetensors")
    two = load_file(traces / f"{family}-{case}.safetensors")
    assert sum(key.startswith("ranges/") for key in one) == 4 * SITES[family], "low, high, scale and zero point"
    assert sum(key.startswith("gradient/0/") for key in one) > 15
    compare(one, two)
