"""Two gloo processes under ZeRO 0, 1, 2 and 3, DDP and FSDP2 compute what one process computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpipe.testing import run_distributed, tiny_config
from qpipe.testing.gradients import compare, write_traces

STEPS = 3
STATIC = {
    "site": "{block}.*output.dense:input",
    "quantizer": "uniform-activation",
    "options": {"granularity": "tensor", "dynamic": False},
}
"""Ranges that are calibrated, so that calibration on several processes is compared too."""
ESTIMATED = [
    {**STATIC, "site": site, "options": {**STATIC["options"], "range": name}}
    for site, name in {
        "{block[0]}.attention.output.dense:input": "current",
        "{block[0]}.output.dense:input": "running",
        "{block[1]}.output.dense:input": "mse-golden",
        "{logits}": "cross-entropy",
    }.items()
]
"""The same with estimators whose result depends on the order of batches, and on all values."""
LEARNED = {"site": "{block}.*query:input", "quantizer": "lsq+-activation", "options": {"bits": 4, "init": "percentile"}}
"""Ranges that are parameters, and begin with what calibration has seen."""
PLAIN = {"site": "{block}.*key:input", "quantizer": "affine-activation", "options": {"bits": 8}}
"""The same with the plain gradients of scale and zero point; `peg` has one of each for every group."""
TRAINED = ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp")
HELD = ("zero1-teacher-cpu", "zero3-offload-all", "zero3-cached")
"""Other ways to have a teacher: sharded in CPU memory, beside a whole student and one that is kept there too, and read
from one process's cache."""
CASES = ("zero0", "zero1", "zero2", "zero3", "zero3-recomputing", "ddp", "fsdp", "fsdp-recomputing", *HELD)
PLUGINS = {
    "kure": {"skip_above": None},
    "ternary-twn": {},
    "ti-g": {"fraction": 0.7},
    "peg": {"groups": 4, "learned": True, "shared": True},
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Gradients of three steps, one in each phase of the teacher's intervention, and the codes after them."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_config(folder)  # makes model, teacher and data
    config = tiny_config(
        folder,
        PLUGINS,
        teacher__name=str(folder / "teacher"),
        quantization__preset="a8",
        quantization__rules=[STATIC, *ESTIMATED, LEARNED, PLAIN],
        export__format="native",
        train__accumulation=2,
        train__max_steps=4,
        train__learning_rate=1e-12,  # so that every phase is compared on equal weights
    ).model_dump(mode="json")
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    write_traces({"one": config}, STEPS, str(folder))
    cases = {}
    for stage in (0, 1, 2, 3):
        extra = {"config_file": str(settings)} if stage == 3 else {}
        cases[f"zero{stage}"] = {**config, "engine": {**config["engine"], "name": "deepspeed", "zero": stage, **extra}}
    cases["ddp"] = config
    cases["fsdp"] = {**config, "engine": {**config["engine"], "fsdp": True}}
    recomputing = {**config["train"], "activation_checkpointing": True}
    cases |= {f"{name}-recomputing": {**cases[name], "train": recomputing} for name in ("zero3", "fsdp")}
    elsewhere = {**config["teacher"], "placement": "cpu"}
    cases["zero1-teacher-cpu"] = {**cases["zero1"], "teacher": elsewhere}
    zero3 = cases["zero3"]
    cases["zero3-offload-all"] = {**zero3, "engine": {**zero3["engine"], "offload": "all"}}
    cached = {**config["teacher"], "cache": str(folder / "cache")}
    write_traces({"one-caching": {**config, "teacher": cached}}, STEPS, str(folder))
    (folder / "cached.json").write_text(json.dumps(cache_files(folder)))
    cases["zero3-cached"] = {**cases["zero3"], "teacher": cached}
    filled = {**config["teacher"], "cache": str(folder / "cache-of-two")}
    cases |= {key: {**zero3, "teacher": filled} for key in ("zero3-filling-cache", "zero3-filled-cache")}
    half = {**config["teacher"], "precision": "bfloat16"}
    write_traces({"one-bfloat16": {**config, "teacher": half}}, STEPS, str(folder))
    cases["zero3-teacher-bfloat16"] = {**zero3, "teacher": half}
    trained = {**config, "train": {**config["train"], "learning_rate": 1e-3}}
    write_traces({"one-trained": trained}, STEPS, str(folder))
    cases |= {f"{name}-trained": {**cases[name], "train": trained["train"]} for name in TRAINED}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        held = run_distributed("cases:traces", cases=cases, steps=STEPS, folder=str(folder))
    (folder / "held.json").write_text(json.dumps(held))
    return folder


def cache_files(folder, name="cache"):
    return sorted(path.name for path in folder.glob(f"{name}/*/*.safetensors"))


pytestmark = pytest.mark.xdist_group("zero")


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_codes_equal_one_process(traces, case):
    one, two = load_file(traces / "one.safetensors"), load_file(traces / f"{case}.safetensors")
    assert sum(key.startswith("gradient/0/") for key in one) > 30
    assert any(key.startswith("codes/") for key in one)
    compare(one, two)
    found = sorted(key for key in one if key.startswith("ranges/"))
    orders = [key for key in found if key.endswith("/order")]
    assert len(orders) == 6, "of the features at three sites in each of two blocks"
    assert len(found) - len(orders) == 5 * 4, "low, high, scale, zero point of four inputs and logits"
    assert sum(key.startswith("learned/") for key in one) == 2 * 2 + 2 * 2 + 6 * 2, "of lsq+, affine, and with groups"
    for key in one:
        assert not key.startswith("codes/") or bool((one[key] == two[key]).all()), key


@pytest.mark.distributed
@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_follow_one_through_updates(traces, case):
    # Adam moves an element whose gradient is nothing but rounding by a whole learning rate, which later gradients feel.
    one, two = load_file(traces / "one-trained.safetensors"), load_file(traces / f"{case}-trained.safetensors")
    start = load_file(traces / "one.safetensors")
    assert any(bool((one[k] != start[k]).any()) for k in one if k.startswith("codes/")), "training changes codes"
    moved = [key for key in one if key.startswith("learned/")]
    assert moved and all(bool((one[key] != start[key]).any()) for key in moved), "training moves learned ranges"
    compare(one, two, after_update=2e-2)


@pytest.mark.distributed
def test_the_teacher_is_sharded_where_the_student_is_or_where_that_is_asked_for(traces):
    held = {case: numbers for case, (numbers, _) in json.loads((traces / "held.json").read_text()).items()}
    whole = held["zero0"]
    assert held["zero1"] == held["zero2"] == held["ddp"] == whole
    for case in ("zero3", "fsdp", "zero1-teacher-cpu", "zero3-offload-all", "zero3-teacher-bfloat16"):
        # Shards are padded to equal sizes.
        assert whole / 2 <= held[case] < 0.55 * whole, case


@pytest.mark.distributed
def test_a_sharded_teacher_in_bfloat16(traces):
    one, two = load_file(traces / "one-bfloat16.safetensors"), load_file(traces / "zero3-teacher-bfloat16.safetensors")
    whole = load_file(traces / "one.safetensors")
    compare(one, two)
    assert any(not torch.allclose(one[key], whole[key], rtol=1e-4) for key in one if key.startswith("gradient/"))


@pytest.mark.distributed
def test_several_processes_read_what_one_cached(traces):
    compare(load_file(traces / "one.safetensors"), load_file(traces / "one-caching.safetensors"), tolerance=0.0)
    before = json.loads((traces / "cached.json").read_text())
    assert len(before) == 1 and cache_files(traces) == before, "a process that misses an example writes a file"


@pytest.mark.distributed
def test_two_processes_fill_a_cache_that_serves_both(traces):
    """Each computes its own half of a batch; the second run finds all of them, and writes nothing."""
    one = load_file(traces / "one.safetensors")
    for case in ("zero3-filling-cache", "zero3-filled-cache"):
        compare(one, load_file(traces / f"{case}.safetensors"))
    found = {case: files for case, (_, files) in json.loads((traces / "held.json").read_text()).items()}
    written = cache_files(traces, "cache-of-two")
    assert found["zero3-filling-cache"] == 0 < len(written) == found["zero3-filled-cache"]
    examples = [{key.partition("/")[0] for key in load_file(path)} for path in traces.glob("cache-of-two/*/*")]
    assert len(set.union(*examples)) == sum(map(len, examples)) > 0, "no example is computed twice"


@pytest.mark.distributed
def test_the_comparison_can_fail(traces):
    one, two = load_file(traces / "one.safetensors"), load_file(traces / "zero3.safetensors")
    key = next(k for k in two if k.startswith("gradient/0/") and k.endswith("query.weight"))
    with pytest.raises(AssertionError, match="gradients differ"):
        compare(one, {**two, key: two[key] * 1.001})
    code = next(k for k in two if k.startswith("codes/"))
    with pytest.raises(AssertionError, match="of the codes differ"):
        compare(one, {**two, code: -two[code]})
    learned = next(k for k in two if k.startswith("learned/"))
    with pytest.raises(AssertionError, match="was learned, not"):
        compare(one, {**two, learned: two[learned] * (1 + 1e-6)})
