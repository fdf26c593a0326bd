"""The teacher: named, or fine-tuned in the run and used again while nothing that decides it has changed."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BloomConfig, OPTConfig

import qpipe
from qpipe import ConfigError, Loss, ModelError, Plugin, PluginError, Signals, SiteError, hookimpl
from qpipe.builtin.log import Log
from qpipe.config import resolve
from qpipe.host import load_plugins
from qpipe.stages.build import override_dropout
from qpipe.stages.execute import evaluate_run
from qpipe.stages.teacher import ensure_teacher
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.tiny import tiny_text_data

TEACHER = importlib.import_module("qpipe.stages.teacher")


class Distil(Plugin):
    """Mean squared error of the logits; counts the teacher's forward passes from the start of training on."""

    needs_teacher = True

    def __init__(self, wanted=("logits",), name="distil"):
        super().__init__()
        self.wanted, self.name, self.calls, self.seen = frozenset(wanted), name, 0, []

    @hookimpl
    def qpipe_model_prepared(self, run):
        def count(*_):
            self.calls += 1

        if run.teacher is not None:
            run.teacher.register_forward_hook(count)

    @hookimpl
    def qpipe_run_start(self):
        self.calls = 0

    @hookimpl
    def qpipe_signals(self):
        return Signals(teacher=self.wanted)

    @hookimpl
    def qpipe_losses(self):
        def mse(step):
            self.seen.append(dict(step.teacher))
            return (step.output.logits - step.teacher["logits", 0]).float().square().mean()

        return [Loss(self.name, mse)]


@pytest.fixture
def trainings(monkeypatch):
    """Configurations with which a teacher was trained."""
    calls, original = [], TEACHER.train

    def train(run, resume=False):
        calls.append(resume)
        return original(run, resume=resume)

    monkeypatch.setattr(TEACHER, "train", train)
    return calls


def host():
    return load_plugins({}, extra=[("distil", Distil())])


def changed(config, **sections):
    return resolve({**config.model_dump(mode="json"), **sections})


def test_it_is_trained_once_and_again_when_what_decides_it_changes(tmp_path, trainings):
    config = tiny_config(tmp_path, teacher__epochs=1, train__max_steps=None, train__epochs=1)
    path, metrics = ensure_teacher(config, host())
    assert trainings == [False] and set(metrics) == {"accuracy"}
    first = load_file(f"{path}/model.safetensors")
    start = load_file(f"{config.model.name}/model.safetensors")
    assert not torch.equal(first["classifier.weight"], start["classifier.weight"])
    assert not (tmp_path / "run" / "teacher" / "checkpoints").exists(), "finished checkpoints only take up room"

    saving = {"train": {**config.train.model_dump(), "save_every": 2, "keep_checkpoints": 1}}
    recomputing = {"train": {**config.train.model_dump(), "activation_checkpointing": True}}
    engine = config.engine.model_dump()
    for same in (
        config,
        changed(config, quantization={"preset": "w2"}),
        changed(config, export={"format": "native"}),
        changed(config, **saving),
        changed(config, **recomputing),
        changed(config, teacher={"epochs": 1, "init_student": False}),
        changed(config, engine={**engine, "name": "deepspeed", "zero": 3}),
        changed(config, engine={**engine, "precision": "auto", "cpu": not torch.cuda.is_available()}),
    ):
        assert ensure_teacher(same, host()) == (path, metrics)
    assert trainings == [False], "nothing that decides the teacher has changed"

    assert ensure_teacher(changed(config, seed=1), host())[0] == path
    assert trainings == [False, False]
    second = load_file(f"{path}/model.safetensors")
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    kept = load_file(tmp_path / "run" / "teacher-before" / "model" / "model.safetensors")
    assert torch.equal(kept["classifier.weight"], first["classifier.weight"]), "hours of work are not thrown away"
    ensure_teacher(changed(config, teacher={"epochs": 1, "learning_rate": 1e-2}, seed=1), host())
    assert len(trainings) == 3
    half = {"engine": {**engine, "precision": "bfloat16"}, "teacher": {"epochs": 1, "learning_rate": 1e-2}, "seed": 1}
    ensure_teacher(changed(config, **half), host())
    assert len(trainings) == 4, "another type decides its weights too"


def test_an_interrupted_one_goes_on(tmp_path, trainings, monkeypatch):
    config = tiny_config(tmp_path, teacher__epochs=1, train__max_steps=None)
    reference, _ = ensure_teacher(changed(config, out=str(tmp_path / "other")), host())
    loop = importlib.import_module("qpipe.stages.train")
    original = loop.after_step

    def interrupt(run, progress, *given):
        original(run, progress, *given)
        if progress.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "after_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_teacher(config, host())
    path, _ = ensure_teacher(config, host())
    assert trainings == [False, False, True]
    expected, found = (load_file(f"{p}/model.safetensors") for p in (reference, path))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_uses_it_once_per_batch_and_starts_from_it(tmp_path, use, fast):
    plugin = Distil(("logits", "probs"))
    use(plugin)
    run = qpipe.execute(tiny_config(tmp_path, teacher__epochs=1, train__max_steps=2, train__learning_rate=1e-9))
    assert plugin.calls == 2, "the teacher runs once per batch"
    assert set(plugin.seen[0]) == {("logits", 0), ("probs", 0), ("probs", 1)}
    assert not plugin.seen[0]["logits", 0].requires_grad
    assert run.results["teacher"].keys() == run.results["evaluation"].keys()
    assert json.loads((run.out / "results.json").read_text())["teacher"] == run.results["teacher"]
    teacher, student = (load_file(run.out / p / "model.safetensors") for p in ("teacher/model", "model"))
    # With hardly a learning rate the student is still where it started: at the teacher.
    assert all(torch.allclose(student[name], value, atol=1e-6) for name, value in teacher.items())
    assert not any(p.requires_grad for p in run.teacher.parameters()) and not run.teacher.training


def test_it_runs_once_per_batch_for_all_plugins_together(tmp_path, use, fast):
    one, other = Distil(("logits", "probs")), Distil(("logits", "hidden_states"), name="other")
    use(one, other)
    tiny_config(tmp_path)
    qpipe.execute(tiny_config(tmp_path, teacher__name=str(tmp_path / "teacher"), train__max_steps=3))
    assert one.calls == other.calls == 3
    for plugin in (one, other):
        assert len(plugin.seen) == 3
        assert {kind for kind, _ in plugin.seen[0]} == {"logits", "probs", "hidden_states"}


def test_a_named_teacher_is_taken_as_it_is(tmp_path, use, fast, trainings):
    use(Distil())
    config = tiny_config(
        tmp_path, teacher__name=str(tmp_path / "teacher"), teacher__init_student=False, train__max_steps=1
    )
    run = qpipe.execute(config)
    assert trainings == [] and not (run.out / "teacher").exists()
    expected = load_file(tmp_path / "teacher" / "model.safetensors")
    assert all(torch.equal(p, expected[n]) for n, p in run.teacher.named_parameters())


def test_without_need_there_is_none(tmp_path, trainings):
    assert ensure_teacher(tiny_config(tmp_path), load_plugins({})) == (None, {})
    assert trainings == []


def test_signals_without_a_teacher_say_what_is_missing(tmp_path, use, fast):
    class Forgot(Distil):
        needs_teacher = False

        @hookimpl
        def qpipe_model_prepared(self):
            pass

    use(Forgot())
    with pytest.raises(ConfigError, match="asks for teacher signals but declares no `needs_teacher = True`"):
        qpipe.execute(tiny_config(tmp_path))


def test_a_teacher_of_another_task(tmp_path, use, fast):
    use(Distil())
    tiny_config(tmp_path)
    other = tiny_model(tmp_path / "other", num_labels=3)
    with pytest.raises(ModelError, match="model '.*other' has 3 labels, the data 2; give a model of this task"):
        qpipe.execute(tiny_config(tmp_path, teacher__name=str(other)))


def test_a_teacher_that_was_not_fine_tuned(tmp_path, use, fast):
    """Its head would be random."""
    use(Distil())
    tiny_config(tmp_path)
    bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    bare.bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="lacks weights, such as classifier.bias: it was not fine-tuned for this task"):
        qpipe.execute(tiny_config(tmp_path, teacher__name=str(tmp_path / "bare"), teacher__init_student=False))


@pytest.mark.parametrize("name", ["model", "data"])
def test_it_is_trained_again_when_a_file_changes(name, tmp_path, trainings):
    config = tiny_config(tmp_path, teacher__epochs=1)
    ensure_teacher(config, host())
    if name == "model":
        tiny_model(tmp_path / "model", seed=5)
    else:
        tiny_text_data(Path(config.data.train), seed=5)
    ensure_teacher(config, host())
    assert trainings == [False, False]


def test_a_file_below_a_folder_of_data_counts(tmp_path):
    data, model = tmp_path / "data", tmp_path / "model"
    for folder in (data, model):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "file").write_text("1")
    before = TEACHER.content_hash(data, below=True)
    assert before is not None and TEACHER.content_hash(model) is None, "below a model lies what it is not made of"
    (data / "below" / "file").write_text("2")
    assert TEACHER.content_hash(data, below=True) != before


def test_a_student_does_not_go_on_with_another_teacher(tmp_path, use, fast, trainings):
    use(Distil())
    config = tiny_config(tmp_path, teacher__epochs=1, train__max_steps=2)
    run = qpipe.execute(config)
    before = (run.out / "teacher" / "model" / "model.safetensors").read_bytes()
    tiny_model(tmp_path / "model", seed=5)
    with pytest.raises(ConfigError, match=r"model has changed since the teacher in .*run was fine-tuned"):
        qpipe.execute(config, resume=True)
    assert (run.out / "teacher" / "model" / "model.safetensors").read_bytes() == before and trainings == [False]


class OwnTask(Plugin):
    """Offers SST-2 by another name, and would be in the way of a teacher's training."""

    @hookimpl
    def qpipe_tasks(self):
        tasks = load_plugins({}).collect("qpipe_tasks")
        return [replace(tasks["sst2"], name="mine")]

    @hookimpl
    def qpipe_model_prepared(self, run):
        assert run.teacher is not None, "called for the teacher's own training"


def test_a_teacher_is_fine_tuned_for_a_task_of_a_plugin(tmp_path, trainings, monkeypatch):
    config = tiny_config(tmp_path, teacher__epochs=1, task="mine")
    config = config.model_copy(update={"plugins": {"own-task": {"value": 1}}})

    def load(options, **kwargs):
        return load_plugins({}, extra=[("own-task", OwnTask())] if options else [], **kwargs)

    monkeypatch.setattr(TEACHER, "load_plugins", load)
    both = load_plugins({}, extra=[("own-task", OwnTask()), ("distil", Distil())])
    path, metrics = ensure_teacher(config, both)
    assert set(metrics) == {"accuracy"} and trainings == [False]
    assert ensure_teacher(config, both) == (path, metrics)
    other = config.model_copy(update={"plugins": {"own-task": {"value": 2}}})
    ensure_teacher(other, both)
    assert trainings == [False, False], "its options may decide what the task is"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization__rules": [{"site": "nothing.*:weight"}]}, SiteError, "nothing"),
        ({"export__format": "tar"}, ConfigError, "export format 'tar' is unknown"),
        ({"quantization__preset": "w99"}, ConfigError, "w99"),
    ],
)
def test_what_is_wrong_shows_before_it_is_trained(changes, error, message, tmp_path, use, trainings):
    use(Distil())
    with pytest.raises(error, match=message):
        qpipe.execute(tiny_config(tmp_path, **changes))
    assert trainings == []


def test_losses_that_do_not_go_together_show_before_it_is_trained(tmp_path, use, trainings):
    use(Distil(), Distil())
    with pytest.raises(PluginError, match="qpipe_losses: 'distil' is offered by both"):
        qpipe.execute(tiny_config(tmp_path))
    assert trainings == []


def test_a_student_with_fewer_layers_starts_from_the_teachers_and_is_read_back(tmp_path, use, trainings):
    """The teacher keeps all layers; the run, its export and its resumed twin have one."""
    use(Distil())
    config = tiny_config(
        tmp_path, model__keep_layers="every-other", teacher__epochs=1, train__max_steps=2, train__learning_rate=1e-9
    )
    run = qpipe.execute(config)
    teacher = load_file(run.out / "teacher" / "model" / "model.safetensors")
    student = load_file(run.out / "model" / "model.safetensors")
    assert sum("encoder.layer.1." in name for name in teacher) > 0
    assert not any("encoder.layer.1." in name for name in student)
    assert len(run.teacher.bert.encoder.layer) == 2 and len(run.student.bert.encoder.layer) == 1
    for name, value in student.items():
        source = teacher[name.replace("encoder.layer.0.", "encoder.layer.1.")]
        assert torch.allclose(value, source, atol=1e-6), name
    assert run.results["verified"], "the packed model has one layer too"
    assert evaluate_run(run.out) == run.results["evaluation"]
    (run.out / "results.json").unlink()
    qpipe.execute(config, resume=True)
    assert trainings == [False], "the same teacher serves"


def test_a_model_of_a_given_depth_with_fewer_layers_is_read_back(tmp_path):
    """Restored, it has the layers that were kept, not as many as `model.config` gave it before."""
    config = tiny_config(
        tmp_path, model__config={"num_hidden_layers": 4}, model__weights="random", model__keep_layers="every-other"
    )
    run = qpipe.execute(config)
    again = restore(run.out)
    assert len(again.student.bert.encoder.layer) == 2
    assert evaluate_run(run.out) == run.results["evaluation"]


def test_one_process_of_accelerate_cannot_keep_a_teacher_in_cpu_memory(tmp_path, use, trainings):
    use(Distil())
    config = tiny_config(tmp_path, teacher__epochs=1, teacher__placement="cpu", engine__fsdp=True)
    with pytest.raises(ConfigError, match="teacher.placement: cpu needs several processes with Accelerate"):
        qpipe.execute(config)
    assert trainings == [], "which shows before it is fine-tuned"


def test_a_cache_below_the_home_directory(tmp_path, use, fast, monkeypatch):
    use(Distil())
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    qpipe.execute(tiny_config(tmp_path, teacher__name=str(tmp_path / "teacher"), teacher__cache="~/cache"))
    assert list((tmp_path / "home" / "cache").iterdir()) and not (tmp_path / "~").exists()


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_dropout_is_that_of_the_configuration_in_every_module(family):
    sizes = {"vocab_size": 40, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    opt = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
    config = OPTConfig(**sizes, **opt) if family == "opt" else BloomConfig(**sizes, n_layer=2, n_head=4)
    config.dropout = config.hidden_dropout = 0.5
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(5, 12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    override_dropout(model, 0.0)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_plugins_hear_of_a_teacher_whose_training_fails(tmp_path, use, monkeypatch):
    """A tracker closes what it has opened, and the progress bar goes."""
    heard = []
    monkeypatch.setattr(Log, "qpipe_run_error", hookimpl(lambda self, run, error: heard.append((run.out, str(error)))))

    def fails(run, resume=False):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TEACHER, "train", fails)
    use(Distil())
    with pytest.raises(RuntimeError, match="out of memory"):
        qpipe.execute(tiny_config(tmp_path, teacher__epochs=1))
    assert heard == [(tmp_path / "run" / "teacher", "out of memory")]
