"""What the teacher says of an example is computed once, for these weights and these inputs."""

import importlib
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import qpipe
from qpipe import CheckpointError, ConfigError, Loss, Plugin, Signals, TapStage, hookimpl
from qpipe.stages import signal_cache
from qpipe.stages.signal_cache import SignalCache, model_digest, row_keys
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.contract import weights_hash


class Distil(Plugin):
    """Learns every signal wanted, and counts the teacher's forward passes."""

    needs_teacher = True

    def __init__(self, *wanted):
        super().__init__()
        self.wanted, self.calls = frozenset(wanted), 0

    @hookimpl
    def qpipe_model_prepared(self, run):
        def count(*_):
            self.calls += 1

        run.teacher.register_forward_hook(count)

    @hookimpl
    def qpipe_signals(self):
        return Signals(teacher=self.wanted, student=self.wanted)

    @hookimpl
    def qpipe_losses(self):
        def mse(step):
            assert step.student.keys() == step.teacher.keys()
            pairs = [(step.student[key], step.teacher[key]) for key in step.teacher]
            return torch.stack([(ours - theirs).float().square().mean() for ours, theirs in pairs]).sum()

        return [Loss("distil", mse)]


@pytest.fixture
def calls(tmp_path, use, fast):
    """`calls(number, *wanted, **changes)`: run with the cache; the run, and how often its teacher ran."""

    def make(number, *wanted, cache=True, **changes):
        plugin = Distil(*wanted)
        use(plugin)
        where = {"teacher__cache": str(tmp_path / "cache")} if cache else {}
        named = {"teacher__name": str(tmp_path / "teacher"), "out": str(tmp_path / f"run{number}")}
        return qpipe.execute(tiny_config(tmp_path, **{**named, **where, **changes})), plugin.calls

    return make


ALL = ("logits", "hidden_states", "scores", "probs", "context", "attention_output")


def test_a_second_run_needs_no_forward_pass_and_ends_in_the_same_bits(calls):
    plain, first, second = (calls(n, *ALL, cache=n > 0) for n in range(3))
    assert (plain[1], first[1], second[1]) == (6, 6, 0)
    assert weights_hash(plain[0].out) == weights_hash(first[0].out) == weights_hash(second[0].out)


def test_a_second_epoch_runs_the_teacher_only_where_an_example_was_left_out(calls):
    # Of 160 examples an epoch takes 144 in 9 steps of 16, so each epoch meets some of the 16 that were left out.
    changes = {"train__max_steps": 27, "data__validation_fraction": 0.2, "train__eval_every": 27}
    _, plain = calls(0, "logits", cache=False, **changes)
    run, cached = calls(1, "logits", **changes)
    per_epoch = len(run.data.train) // 16
    assert plain == 27 and per_epoch <= cached < 27
    entries = [name for file in run.out.parent.glob("cache/*/*.safetensors") for name in load_file(file)]
    assert len(entries) == len(set(entries)) <= len(run.data.train)
    _, again = calls(2, "logits", **changes)
    assert again == 0


def test_what_is_new_is_added(calls):
    _, first = calls(0, "logits")
    _, second = calls(1, "logits", "hidden_states")
    _, third = calls(2, "hidden_states")
    assert (first, second, third) == (6, 6, 0)


@pytest.mark.parametrize("change", ["weights", "data", "length", "precision"])
def test_another_teacher_or_other_data_are_not_served_from_it(change, calls, tmp_path):
    calls(0, "logits", "hidden_states")
    changes = {}
    if change == "weights":
        tiny_model(tmp_path / "teacher", seed=9)
    elif change == "data":
        path = tmp_path / "data" / "train.jsonl"
        path.write_text(path.read_text().replace("good", "fine").replace("bad", "dull"))
    elif change == "length":
        changes["data__max_length"] = 15
    else:
        changes["teacher__precision"] = "bfloat16"
    run, count = calls(1, "logits", "hidden_states", **changes)
    assert count == 6
    if change == "precision":
        assert {p.dtype for p in run.teacher.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in run.student.parameters()} == {torch.float32}


def test_keys_tell_inputs_apart_but_not_padding():
    def key(ids, mask, **more):
        return row_keys({"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask]), **more})[0]

    assert key([1, 2, 0], [1, 1, 0]) == key([1, 2], [1, 1]) == key([1, 2, 0, 0], [1, 1, 0, 0])
    assert key([0, 1, 2], [0, 1, 1]) != key([1, 2], [1, 1]), "padding in front moves positions"
    assert key([1, 0, 2], [1, 0, 1]) != key([1, 0, 2], [1, 1, 1])
    assert key([1, 2], [1, 1]) != key([2, 1], [1, 1])
    assert key([1, 2], [1, 1], token_type_ids=torch.tensor([[0, 1]])) != key([1, 2], [1, 1])
    pixels = torch.rand(2, 3, 4, 4)
    assert len(set(row_keys({"pixel_values": pixels}))) == 2
    assert row_keys({"pixel_values": pixels})[1] == row_keys({"pixel_values": pixels[1:]})[0]


def test_the_digest_tells_weights_configurations_and_types_apart(tmp_path):
    def load(seed=0, **sizes):
        return AutoModelForSequenceClassification.from_pretrained(tiny_model(tmp_path / "m", seed=seed, **sizes))

    model = load()
    found = [
        model_digest(model, {}),
        model_digest(load(seed=1), {}),
        model_digest(load(num_attention_heads=1), {}),
        model_digest(load().bfloat16(), {}),
        model_digest(model, {"length": 8}),
    ]
    assert len(set(found)) == len(found)
    tiny_model(tmp_path / "elsewhere")
    same = AutoModelForSequenceClassification.from_pretrained(tmp_path / "elsewhere")
    assert model_digest(same, {}) == found[0], "a path decides nothing"


def test_texts_of_changing_length_keep_logits_only(calls):
    assert calls(0, "logits", data__pad_to_max_length=False)[1] == 6
    assert calls(1, "logits", data__pad_to_max_length=False)[1] == 0
    with pytest.raises(ConfigError, match=r"cannot keep hidden_states: .*set data.pad_to_max_length: true"):
        calls(2, "logits", "hidden_states", data__pad_to_max_length=False)


def test_what_cannot_be_cached_shows_before_the_teacher_is_trained(calls, monkeypatch):
    train = importlib.import_module("qpipe.stages.teacher")
    monkeypatch.setattr(train, "_fine_tune", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="cannot keep scores"):
        calls(0, "scores", data__pad_to_max_length=False, teacher__name=None)


def test_examples_made_anew_in_every_epoch_are_refused(calls):
    with pytest.raises(ConfigError, match="task 'masked-lm' makes its training examples anew in every epoch"):
        calls(0, "logits", task="masked-lm", data__text_columns=["sentence"], teacher__name=None)


def test_a_plugin_that_looks_into_the_teacher_by_itself_is_refused(calls, monkeypatch):
    def look(self, run):
        if run.teacher is not None:
            run.teacher_instruments.add_tap("bert.pooler.dense:input", TapStage.OBSERVE, lambda x: x)

    monkeypatch.setattr(Distil, "qpipe_model_prepared", hookimpl(look))
    assert calls(0, "logits", cache=False)[0].results["evaluation"]
    with pytest.raises(ConfigError, match="looks into the teacher at 'bert.pooler.dense:input' by itself"):
        calls(1, "logits")


class Alone:
    """The one process there is."""

    rank, device = 0, torch.device("cpu")

    def any(self, flag):
        return bool(flag)

    def barrier(self):
        pass


INPUTS = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
SIGNALS = {("hidden_states", layer): torch.full((2, 2, 4), float(layer)) for layer in range(3)}


def test_a_full_disk_shows_before_anything_is_written(tmp_path, monkeypatch):
    # 3 layers x 2 tokens x 4 floats of 4 bytes for each of 10^6 examples are 96 MB.
    usage = SimpleNamespace(free=int(95e6))
    monkeypatch.setattr(signal_cache.shutil, "disk_usage", lambda _: usage)
    cache = SignalCache(tmp_path, Alone(), 10**6)
    with pytest.raises(ConfigError, match=r"hidden_states of 1000000 examples need 0.096 GB more"):
        cache.store(INPUTS, frozenset({"hidden_states"}), SIGNALS)
    usage.free = int(97e6)
    cache = SignalCache(tmp_path, Alone(), 10**6)
    cache.store(INPUTS, frozenset({"hidden_states"}), SIGNALS)


def test_what_is_wanted_later_or_after_a_resumption_only_warns(tmp_path, monkeypatch, caplog):
    """It may be wanted for a few steps: of 10^6 examples for none but those of an intervention."""
    monkeypatch.setattr(signal_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(95e6)))
    monkeypatch.setattr(logging.getLogger("qpipe"), "propagate", True)
    cache = SignalCache(tmp_path, Alone(), 10**6)
    logits = {("logits", 0): torch.zeros(2, 2)}
    cache.store(INPUTS, frozenset({"logits"}), logits)
    cache.store(INPUTS, frozenset({"logits", "hidden_states"}), {**logits, **SIGNALS})
    SignalCache(tmp_path, Alone(), 10**6, begun=True).store(INPUTS, frozenset({"hidden_states"}), SIGNALS)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "hidden_states, logits of 1000000 examples take up to 0.104 GB more" in warnings[0]
    assert "hidden_states of 1000000 examples take up to 0.096 GB more" in warnings[1]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_without_a_folder_shows_before_anything_is_loaded(place, calls, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file.*or name another folder in teacher.cache"):
        calls(0, "logits", teacher__cache=str(tmp_path / place), data__train=str(tmp_path / "absent.jsonl"))


def test_an_example_keeps_what_was_captured_first(tmp_path):
    cache, kinds = SignalCache(tmp_path, Alone(), 3), frozenset({"logits"})

    def capture(ids, value):
        inputs = {"input_ids": torch.tensor(ids)}
        return cache.store(inputs, kinds, {("logits", 0): torch.full((len(ids), 2), value)})["logits", 0]

    assert torch.equal(capture([[1], [2]], 1.0), torch.full((2, 2), 1.0))
    assert torch.equal(capture([[3], [2]], 5.0), torch.tensor([[5.0, 5.0], [1.0, 1.0]]))


def test_two_runs_that_fill_one_folder_each_keep_what_they_captured(tmp_path):
    """Whichever writes first; a later run finds what was written first."""
    kinds, inputs, other = frozenset({"logits"}), {"input_ids": torch.tensor([[1]])}, {"input_ids": torch.tensor([[2]])}
    runs = [SignalCache(tmp_path, Alone(), 2) for _ in range(2)]
    for number, run in enumerate(runs):
        run.store(inputs, kinds, {("logits", 0): torch.full((1, 2), float(number))})
    for number in (1, 0):
        runs[number].flush()
        os.utime(max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns), ns=(0, 10 - number))
    for number, run in enumerate(runs):
        assert run.load(other, kinds) is None, "a miss opens the files of others"
        assert torch.equal(run.load(inputs, kinds)["logits", 0], torch.full((1, 2), float(number)))
    third = SignalCache(tmp_path, Alone(), 2)
    assert torch.equal(third.load(inputs, kinds)["logits", 0], torch.full((1, 2), 1.0))


def test_another_process_finds_what_is_flushed_and_a_damaged_file_is_named(tmp_path):
    ours, theirs = SignalCache(tmp_path, Alone(), 2), SignalCache(tmp_path, Alone(), 2)
    kinds = frozenset({"hidden_states"})
    ours.store(INPUTS, kinds, SIGNALS)
    assert theirs.load(INPUTS, kinds) is None
    ours.flush()
    found = theirs.load({"input_ids": INPUTS["input_ids"].flip(0)}, kinds)
    assert found.keys() == SIGNALS.keys() and all(torch.equal(found[key], SIGNALS[key]) for key in SIGNALS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=f"{file.name} of the teacher's cache cannot be read .*delete it"):
        SignalCache(tmp_path, Alone(), 2)
