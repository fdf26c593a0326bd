"""Losses over tokens: two processes, whose shares of a batch have other numbers of labels, compute what one does."""

import json

import pytest
from safetensors.torch import load_file

from qpipe.testing import run_distributed, tiny_config
from qpipe.testing.gradients import compare, write_traces
from qpipe.testing.tiny import tiny_slot_data

STEPS = 2


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    slots = str(tiny_slot_data(folder / "slots.jsonl"))
    usual = {"train__accumulation": 2, "train__learning_rate": 1e-12, "data__pad_to_max_length": False}
    masked = {"task": "masked-lm", "data__text_columns": ["sentence"], **usual}
    configs = {
        "masked-lm": tiny_config(folder, **masked),
        "random-masked-lm": tiny_config(folder, model__weights="random", **masked),
        "intent-slot": tiny_config(folder, task="intent-slot", data__train=slots, data__max_length=24, **usual),
    }
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    cases = {}
    for kind, config in configs.items():
        plain = config.model_dump(mode="json")
        write_traces({f"{kind}-one": plain}, STEPS, str(folder))
        for stage in (2, 3):
            engine = {**plain["engine"], "name": "deepspeed", "zero": stage}
            extra = {"config_file": str(settings)} if stage == 3 else {}
            cases[f"{kind}-zero{stage}"] = {**plain, "engine": {**engine, **extra}}
    run_distributed("qpipe.testing.gradients:write_traces", cases=cases, steps=STEPS, folder=str(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.xdist_group("tokens")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["masked-lm", "random-masked-lm", "intent-slot"])
def test_gradients_equal_one_process(traces, kind, stage):
    one, two = (load_file(traces / f"{kind}-{case}.safetensors") for case in ("one", f"zero{stage}"))
    assert sum(key.startswith("gradient/1/") for key in one) > 25
    compare(one, two)
