"""A named teacher must read the same tokens and number its labels alike; captured maps need gradients."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, ViTImageProcessorPil

import qpipe
from qpipe import ConfigError, ModelError, Plugin, Signals, WeightLoss, hookimpl
from qpipe.stages.recomputing import reentrant_module
from qpipe.stages.teacher_fit import (
    compare_labels,
    compare_processors,
    compare_tokenizers,
    load_own_processor,
    load_tokenizer,
)
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.tiny import VOCABULARY


def tokenizer(folder, words, **options):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"), **options)


def test_tokens_with_other_ids_are_refused(tmp_path):
    ours = tokenizer(tmp_path / "ours", VOCABULARY)
    swapped = [*VOCABULARY[:-2], VOCABULARY[-1], VOCABULARY[-2]]
    with pytest.raises(ModelError, match="token 'scene' has id 29 in this run, .* tokenizer of teacher T gives it 30"):
        compare_tokenizers(ours, tokenizer(tmp_path / "swapped", swapped), "T")
    with pytest.raises(ModelError, match="token 'this' has id 30 in this run, .* does not have it; name a teacher"):
        compare_tokenizers(ours, tokenizer(tmp_path / "short", VOCABULARY[:-1]), "T")
    compare_tokenizers(ours, tokenizer(tmp_path / "longer", (*VOCABULARY, "extra")), "T")


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path):
    words = (*VOCABULARY, "Good")
    ours, theirs = tokenizer(tmp_path / "lower", words), tokenizer(tmp_path / "cased", words, do_lower_case=False)
    compare_tokenizers(ours, theirs, "T", [("good movie",)])
    with pytest.raises(ModelError, match="teacher T cuts 'Good movie' into other tokens"):
        compare_tokenizers(ours, theirs, "T", [("good movie",), ("Good movie",)])


def test_a_teacher_that_is_used_to_segments_is_refused_where_there_are_none(tmp_path):
    """As a BERT beside a student whose tokenizer is DistilBERT's: it would take both sentences for one."""
    with_segments = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "model"))
    without = AutoTokenizer.from_pretrained(tmp_path / "model", model_input_names=["input_ids", "attention_mask"])
    single, pairs = [("the movie",)], [("the movie", "a film")]
    compare_tokenizers(without, with_segments, "teacher", single)
    compare_tokenizers(with_segments, with_segments, "teacher", pairs)
    compare_tokenizers(with_segments, without, "teacher", pairs)
    with pytest.raises(ModelError, match="used to token_type_ids, which the tokenizer of this run does not give"):
        compare_tokenizers(without, with_segments, "teacher", pairs)


def test_a_teacher_of_other_pixels_is_refused(tmp_path):
    ours = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16})
    ours.save_pretrained(tmp_path / "same")
    compare_processors(ours, load_own_processor(str(tmp_path / "same")), "teacher")
    other = ViTImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match=r"images have image_mean .0.5, 0.5, 0.5. in this run, and .0.4, 0.4, 0.4. for"
    ):
        compare_processors(ours, load_own_processor(str(tmp_path / "other")), "teacher")
    assert load_own_processor(str(tmp_path)) is None


def test_labels():
    compare_labels(["negative", "positive"], ["NEGATIVE", "POSITIVE"], "T")
    compare_labels(["LABEL_0", "LABEL_1"], ["negative", "positive"], "T")
    compare_labels(["negative", "positive"], ["0", "1"], "T")
    with pytest.raises(ModelError, match=r"the same in another order; set data.labels: \[positive, negative\]"):
        compare_labels(["negative", "positive"], ["Positive", "Negative"], "T")
    with pytest.raises(ModelError, match="run are no, yes, those of teacher T red, green; name a teacher of this task"):
        compare_labels(["no", "yes"], ["red", "green"], "T")
    with pytest.raises(ModelError, match=r"in another order; set data.labels: \[2, 0, 1\]"):
        compare_labels(["neutral", "con", "pro"], ["pro", "neutral", "con"], "T", [0, 1, 2])
    compare_labels(["no", "yes"], ["red", "green"], "T", [0, 1])


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 4}, {"hidden_size": 64}], ids=["deeper", "wider"])
def test_a_named_teacher_does_not_take_the_place_of_the_model(tmp_path, use, fast, sizes):
    """The student starts as a copy of it, and `model.name` would not be trained at all."""
    use(Logits())
    config = tiny_config(tmp_path, train__max_steps=1, teacher__name=str(tmp_path / "teacher"))
    tiny_model(tmp_path / "teacher", seed=1, **sizes)
    (key, theirs), ours = next(iter(sizes.items())), {"num_hidden_layers": 2, "hidden_size": 32}
    with pytest.raises(
        ConfigError, match=rf"different architectures \({key} {ours[key]} and {theirs}\), .*init_student: "
    ):
        qpipe.execute(config)
    own = config.teacher.model_copy(update={"init_student": False})
    run = qpipe.execute(config.model_copy(update={"teacher": own}))
    assert getattr(run.student.config, key) == ours[key] and getattr(run.teacher.config, key) == theirs


def name_of_labels(folder, *names):
    config = AutoConfig.from_pretrained(folder)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.save_pretrained(folder)


@pytest.mark.parametrize("task", ["sst2", "classification"])
def test_integer_labels_are_compared_by_the_names_of_the_task_or_of_the_model(tmp_path, use, fast, task):
    """A teacher that numbers them otherwise would teach the opposite; `data.labels` puts that right."""
    use(Learn())
    changes = {"task": task, "data__text_columns": ["sentence"], "teacher__name": str(tmp_path / "teacher")}
    config = tiny_config(tmp_path, train__max_steps=1, **changes)
    name_of_labels(tmp_path / "teacher", "POSITIVE", "NEGATIVE")
    if task == "classification":
        name_of_labels(tmp_path / "model", "negative", "positive")
    labels = ["positive", "negative"] if task == "sst2" else [1, 0]
    with pytest.raises(ModelError, match=rf"another order; set data.labels: \[{labels[0]}, {labels[1]}\]"):
        qpipe.execute(config)
    run = qpipe.execute(tiny_config(tmp_path, train__max_steps=1, data__labels=labels, **changes))
    ids = [json.loads(line)["label"] for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    kept = [*run.data.train["labels"], *run.data.validation["labels"]]
    assert sorted(kept) == sorted(1 - value for value in ids)
    assert sum(kept) != sum(ids), "the example has as many of both"


class Reentrant(Plugin):
    """A model that checkpoints activations itself, and a penalty on a weight within if it is asked for."""

    def __init__(self, penalty):
        super().__init__()
        self.penalty = penalty

    @hookimpl
    def qpipe_weight_losses(self):
        if self.penalty:
            yield WeightLoss("squares", lambda w: w.square().sum(), 1.0, lambda path: path.endswith("query"))

    @hookimpl
    def qpipe_model_prepared(self, run):
        run.student.activation_checkpointing_enable({"use_reentrant": True})


class Logits(Plugin):
    """Needs what any teacher has."""

    needs_teacher = True

    @hookimpl
    def qpipe_signals(self):
        return Signals(teacher=frozenset({"logits"}))


class Learn(Plugin):
    """Needs a teacher's attention scores."""

    needs_teacher = True

    def __init__(self, reentrant=False):
        super().__init__()
        self.reentrant = reentrant

    @hookimpl
    def qpipe_signals(self):
        return Signals(teacher=frozenset({"scores"}), student=frozenset({"scores"}))

    @hookimpl
    def qpipe_model_prepared(self, run):
        if self.reentrant:
            run.student.activation_checkpointing_enable({"use_reentrant": True})


def test_a_run_compares_before_it_builds(tmp_path, use):
    use(Learn())
    tiny_config(tmp_path)  # makes model, teacher and data
    named = AutoConfig.from_pretrained(tmp_path / "teacher")
    named.id2label = {0: "up", 1: "down"}
    named.save_pretrained(tmp_path / "teacher")
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(
            line.replace('"label": 1', '"label": "down"').replace('"label": 0', '"label": "up"')
            for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
        )
    )
    config = tiny_config(tmp_path, teacher__name=str(tmp_path / "teacher"), data__labels=["down", "up"])
    with pytest.raises(ModelError, match="labels of this run are down, up, those of teacher .*teacher up, down"):
        qpipe.execute(config)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "teacher" / name).unlink(missing_ok=True)
    assert load_tokenizer(str(tmp_path / "teacher"), False) is None
    tokenizer(tmp_path / "words", VOCABULARY[::-1]).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ModelError, match="token .* has id 0 in this run"):
        qpipe.execute(config)


REENTRANT = "activations of bert with use_reentrant=True, .* no gradient to attention maps"


def test_reentrant_checkpointing_with_captured_maps_is_refused(tmp_path, use, fast):
    """It would train without a gradient from them."""
    use(Learn(reentrant=True))
    tiny_config(tmp_path)
    tiny_model(tmp_path / "teacher", seed=1)
    with pytest.raises(ModelError, match=REENTRANT):
        qpipe.execute(tiny_config(tmp_path, teacher__name=str(tmp_path / "teacher")))


def test_reentrant_checkpointing_is_refused_before_a_teacher_is_fine_tuned(tmp_path, use):
    use(Learn(reentrant=True))
    with pytest.raises(ModelError, match=REENTRANT):
        qpipe.execute(tiny_config(tmp_path))
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(
    ("penalty", "changes", "told"),
    [
        (True, {}, r"gives no gradient to penalties on weights \(squares\); turn"),
        (False, {"quantization__noise": 0.5}, "gives other weights in the forward pass than quantization.noise"),
    ],
    ids=["penalty", "noise"],
)
def test_reentrant_checkpointing_that_would_train_otherwise_is_refused(tmp_path, assembled, penalty, changes, told):
    """The penalty is met when its module runs with a graph, which is after the loss was formed."""
    with pytest.raises(ModelError, match=told):
        assembled(tiny_config(tmp_path, **changes), Reentrant(penalty))


@pytest.mark.parametrize("changes", [{}, {"quantization__preset": None, "quantization__noise": 0.5}], ids=str)
def test_reentrant_checkpointing_that_loses_nothing_is_left_to_the_model(tmp_path, assembled, changes):
    run = assembled(tiny_config(tmp_path, **changes), Reentrant(penalty=False))
    assert reentrant_module(run.student) is not None
