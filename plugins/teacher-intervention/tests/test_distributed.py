"""Every family under ZeRO 0 to 3, and a change of phase under every engine, on two gloo processes."""

import json

import pytest
from safetensors.torch import load_file
from ti_families import FAMILIES, evaluations, run_config

from qpipe.testing import run_distributed
from qpipe.testing.gradients import compare, write_traces

STEPS = 4
ENGINES = {
    "zero0": {"name": "deepspeed", "zero": 0},
    "zero1": {"name": "deepspeed", "zero": 1},
    "zero2": {"name": "deepspeed", "zero": 2},
    "zero3": {"name": "deepspeed", "zero": 3},
    "ddp": {},
    "fsdp": {"fsdp": True},
}
STAGES = (0, 1, 2, 3)
RECOMPUTING = ("vit", "qwen3")
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ti")]


def with_engine(source, folder, **engine):
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    extra = {"config_file": str(settings)} if engine.get("zero") == 3 else {}
    return {**source, "engine": {**source["engine"], **engine, **extra}}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder of traces of four steps (outputs, contexts, maps, none replaced); ages of the optimizer by engine;
    perplexities with the teacher's attention and without, by engine."""
    folder, single, sharded = tmp_path_factory.mktemp("ti"), {}, {}
    for family in FAMILIES:
        # On equal weights in every step.
        options = {"steps": 3, "output_loss_on": "norm" if family in ("bert", "vit") else "projection"}
        source = run_config(folder, family, options, learning_rate=1e-12).model_dump(mode="json")
        single[f"one-{family}"] = source
        for stage in STAGES:
            sharded[f"{family}-{stage}"] = with_engine(source, folder, name="deepspeed", zero=stage)
        if family in RECOMPUTING:
            sharded[f"{family}-3"]["train"] = {**source["train"], "activation_checkpointing": True}
    two_steps = run_config(folder, "bert", {"preset": "reference", "steps": 3, "learning_rate": 1e-3})
    aged = {name: with_engine(two_steps.model_dump(mode="json"), folder, **engine) for name, engine in ENGINES.items()}
    write_traces(single, STEPS, str(folder))
    options = {"steps": 3, "in_evaluation": True}
    seen = run_config(folder, "qwen3", options, learning_rate=1e-12).model_dump(mode="json")
    evaluated = {name: with_engine(seen, folder, **ENGINES[name]) for name in ("zero3", "fsdp")}
    ages, metrics = run_distributed(
        "ti_families:traces_and_ages",
        traced=sharded,
        aged=aged,
        evaluated=evaluated,
        steps=STEPS,
        folder=str(folder),
        timeout=1200,
    )
    return folder, ages, {**metrics, **evaluations({"one": seen})}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_zero_equal_one_process(found, family, stage):
    folder, *_ = found
    one, two = load_file(folder / f"one-{family}.safetensors"), load_file(folder / f"{family}-{stage}.safetensors")
    for step in range(STEPS):
        assert sum(key.startswith(f"gradient/{step}/") and bool(one[key].any()) for key in one) > 10
    compare(one, two)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_optimizer_is_fresh_after_the_intervention(found, engine):
    assert found[1][engine] == [[1], [2], [3], [1]]


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_evaluations_with_the_teachers_attention_equal_one_process(found, engine):
    one, two = found[2]["one"], found[2][engine]
    assert two == pytest.approx(one, rel=1e-5)
    assert abs(one[0] - one[1]) > 0.01 * one[1], "the teacher's attention must matter"
