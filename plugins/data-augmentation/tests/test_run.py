"""Whole runs: budgets, labels, the folder, other tasks; and what is refused."""

import json
import logging
import shutil
from itertools import groupby
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from qpipe_data_augmentation import DataAugmentation, DataAugmentationOptions
from qpipe_data_augmentation.blocks import EXAMPLE

import qpipe
from qpipe import CheckpointError, ConfigError, DataError, ModelError, PluginError, resolve
from qpipe.data.loading import find_task, load_data
from qpipe.engine import connect
from qpipe.host import build_plugin, load_plugins
from qpipe.testing import tiny_config, tiny_model

EXAMPLES = 128


@pytest.fixture
def change(tmp_path, masked_lm):
    """`change(epochs=..., **options)`: the data of the tiny run as the plugin leaves them, and the tiny run's own."""

    def make(config=None, epochs=3.0, **options):
        if "budget" not in options or options["budget"] in "AC":
            options = {"model": str(masked_lm), "neighbours": "none", "trials": 3, **options}
        if config is None:
            config = tiny_config(tmp_path, train__max_steps=None, train__epochs=epochs)
        task = find_task(load_plugins({}).collect("qpipe_tasks"), config.task)
        data = load_data(config, task)
        plugin = DataAugmentation(DataAugmentationOptions(**options))
        return plugin.qpipe_training_data(config, task, data, connect(config.engine)), data

    return make


def files_of(folder):
    """The augmented rows of the tiny run."""
    return sorted((folder / "run" / "augmented").glob("*/part-*.parquet"))


@pytest.mark.parametrize(("budget", "steps"), [("O", 24), ("O2", 48), ("O4", 96)])
def test_longer_budgets_need_no_model(change, budget, steps):
    changed, data = change(budget=budget)
    assert changed.train is data.train and changed.steps == steps


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (None, "budget O4: 96 steps on 128 examples"),
        (10, "budget O4: 10 steps on 128 examples, since train.max_steps comes before the budget's 96"),
    ],
)
def test_the_log_says_how_long_the_training_will_be(most, message, change, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qpipe"), "propagate", True)
    caplog.set_level(logging.INFO, "qpipe")
    change(tiny_config(tmp_path, train__max_steps=most, train__epochs=3.0), budget="O4")
    assert [record.message for record in caplog.records if record.message.startswith("budget")] == [message]


def test_rows_follow_their_examples(change, tmp_path):
    """Labels and order, from the files on disk: every example begins with itself."""
    changed, data = change(block=50)
    files = files_of(tmp_path)
    assert [file.name for file in files] == [f"part-0000{i}.parquet" for i in range(3)]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [list(pq.read_table(file)[EXAMPLE].to_numpy()[[0, -1]]) for file in files] == [
        [0, 49],
        [50, 99],
        [100, 127],
    ]
    assert [row[EXAMPLE] for row in rows] == sorted(row[EXAMPLE] for row in rows)
    for example, group in groupby(rows, key=lambda row: row[EXAMPLE]):
        sentences = [row["sentence"] for row in group]
        original = data.text.split.data["sentence"][example]
        assert sentences[0] == original and len(set(sentences)) == len(sentences) <= 4
        for sentence in sentences:
            assert len(sentence.split()) == len(original.split())
            stops = [
                (a, b) for a, b in zip(original.split(), sentence.split(), strict=True) if a in ("the", "is", "not")
            ]
            assert all(a == b for a, b in stops), "stop words stay"
    assert changed.train["labels"] == [data.train["labels"][row[EXAMPLE]] for row in rows]
    assert changed.steps == len(rows) // 16 and EXAMPLES * 2 < len(rows) <= EXAMPLES * 4, "budget A is one pass"
    encoded = data.tokenizer([row["sentence"] for row in rows], truncation=True, max_length=16)["input_ids"]
    assert changed.train["input_ids"][:] == encoded


def test_a_folder_below_the_home_directory(change, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    change(folder="~/rows")
    assert list((tmp_path / "home" / "rows").iterdir()) and not (tmp_path / "~").exists()


def test_rows_are_made_once_and_by_what_decides_them(change, tmp_path, monkeypatch):
    first, _ = change(folder=str(tmp_path / "kept"))

    def load(*given, **hub):
        raise LookupError("asked for")

    monkeypatch.setattr("qpipe_data_augmentation.augment.load_masked_lm", load)
    again, _ = change(folder=str(tmp_path / "kept"), budget="C")
    assert again.train["input_ids"][:] == first.train["input_ids"][:]
    assert again.steps == 12 * len(first.train) // 16
    with pytest.raises(LookupError, match="asked for"):
        change(folder=str(tmp_path / "kept"), seed=1)


@pytest.mark.parametrize(
    "changed",
    [
        {"trials": 2},
        {"probability": 0.9},
        {"candidates": 3},
        {"in_place": True},
        {"special_tokens": True},
        {"neighbours": "none", "neighbours_from": None},
        "texts",
        "neighbours",
    ],
    ids=str,
)
def test_whatever_decides_the_rows_names_their_folder(change, tmp_path, changed):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("good fine\nmovie film\n")
    options = {"folder": str(tmp_path / "kept"), "neighbours": "ppdb", "neighbours_from": str(pairs), "trials": 1}
    config = tiny_config(tmp_path, train__max_steps=None)
    change(config, **options)
    if changed == "texts":
        train = Path(config.data.train)
        train.write_text(train.read_text().replace("movie", "film", 1))
    elif changed == "neighbours":
        pairs.write_text("good great\nmovie film\n")
    else:
        options |= changed
    change(config, **options)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_probability_and_number_of_candidates_reach_the_rows(change, tmp_path):
    """How many words change, and into how many others."""
    config = tiny_config(tmp_path, train__max_steps=None)

    def replaced(**options):
        folder = tmp_path / str(options)
        _, original = change(config, folder=str(folder), trials=4, **options)
        texts = original.text.split.data["sentence"]
        rows = [row for file in sorted(folder.glob("*/part-*.parquet")) for row in pq.read_table(file).to_pylist()]
        words = [
            pair for row in rows for pair in zip(texts[row[EXAMPLE]].split(), row["sentence"].split(), strict=True)
        ]
        new = [after for before, after in words if before != after]
        return len(new) / len(words), len(set(new))

    (often, many), (seldom, _) = replaced(probability=1.0), replaced(probability=0.02)
    _, few = replaced(probability=1.0, candidates=1)
    assert often > 5 * seldom > 0 and many > few


def test_the_number_of_new_sentences_is_that_of_the_task(change, tmp_path, monkeypatch):
    """In TinyBERT's settings, where no number is given."""
    seen = []

    def augment(source, *rest):
        seen.append(source.trials)
        raise LookupError("seen")

    monkeypatch.setattr("qpipe_data_augmentation.plugin.augment", augment)
    columns = {"data__text_columns": ["sentence"], "data__label_column": "label"}
    for task in ("sst2", "classification"):
        with pytest.raises(LookupError, match="seen"):
            change(tiny_config(tmp_path, task=task, train__max_steps=None, **columns), trials=None)
    assert seen == [20, 30]


def test_a_run_does_not_go_on_with_other_rows(tmp_path, masked_lm):
    """Order, length and best metric would be others; the same name need not be the same model."""
    model = tmp_path / "masked-lm"
    shutil.copytree(masked_lm, model)
    options = {"budget": "A", "model": str(model), "neighbours": "none", "trials": 1}
    config = tiny_config(tmp_path, plugins={"data-augmentation": options}, train__max_steps=4, train__save_every=2)
    qpipe.execute(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + bytes(4))
    with pytest.raises(ConfigError, match=r"trained on augmented rows \w{16}, and .* now give \w{16}; put back"):
        qpipe.execute(config, resume=True)
    weights.write_bytes(before)
    assert qpipe.execute(config, resume=True).results["resumed_step"] == 2


def test_a_folder_whose_name_is_a_pattern(tmp_path, change):
    """Brackets in a path are brackets."""
    config = tiny_config(tmp_path, train__max_steps=None, out=str(tmp_path / "run[1]*"))
    changed, data = change(config)
    assert len(changed.train) > len(data.train) and (tmp_path / "run[1]*" / "augmented").is_dir()


def test_a_disk_that_is_full_when_the_rows_are_there_costs_none_of_them(tmp_path, change, monkeypatch):
    real = datasets.load_dataset

    def full(*words, **options):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", lambda *w, **o: full() if w[0] == "parquet" else real(*w, **o))
    with pytest.raises(DataError, match=r"are whole, but no copy .* No space left on device.* no row is made anew"):
        change()
    before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
    monkeypatch.setattr(datasets, "load_dataset", real)
    change()
    assert before and {path: path.stat().st_mtime_ns for path in files_of(tmp_path)} == before


def test_a_damaged_file_of_rows_is_named_and_made_again(tmp_path, change):
    changed, _ = change()
    whole = changed.train.to_dict()
    first, *others = files_of(tmp_path)
    shutil.rmtree(first.parent / "cache")
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{first.name} cannot be read .*delete it, and only its rows are made again"):
        change()
    before = {path: path.stat().st_mtime_ns for path in others}
    first.unlink()
    again, _ = change()
    assert again.train.to_dict() == whole
    assert {path: path.stat().st_mtime_ns for path in others} == before


def test_texts_without_a_word_to_replace_are_refused(tmp_path, change):
    config = tiny_config(tmp_path, train__max_steps=None)
    path = Path(config.data.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "sentence": "Привет, мир! the 7"}) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"the first 128 examples have no word that could be replaced"):
        change(config)
    assert not files_of(tmp_path), "which shows before any are written"


def test_a_seed_gives_other_rows(change, tmp_path):
    first, second = (change(folder=str(tmp_path / "kept"), seed=seed)[0] for seed in (0, 1))
    assert first.train["input_ids"][:] != second.train["input_ids"][:]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_pairs_of_sentences_come_from_a_column_each(change, tmp_path, masked_lm):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"sentence1": "the movie", "sentence2": "great fun", "label": 0}\n' * 4 +
                    '{"sentence1": "bad plot", "sentence2": "the actor", "label": 1}\n' * 4)  # fmt: skip
    config = tiny_config(tmp_path, task="rte", data__train=str(data), data__validation_fraction=0.25)
    changed, original = change(config, trials=4)
    rows = [row for file in files_of(tmp_path) for row in pq.read_table(file).to_pylist()]
    varied = [
        tuple(row[column] != original.text.split.data[column][row[EXAMPLE]] for column in ("sentence1", "sentence2"))
        for row in rows
    ]
    assert set(varied) == {(False, False), (True, False), (False, True)}, "one sentence at a time"
    pairs = [[row[column] for row in rows] for column in ("sentence1", "sentence2")]
    assert changed.train["input_ids"][:] == original.tokenizer(*pairs)["input_ids"]
    assert {tuple(ids) for ids in changed.train["token_type_ids"]} == {(0, 0, 0, 0, 1, 1, 1)}


def test_the_runs_own_model_without_a_head_names_the_option(change):
    with pytest.raises(
        ModelError, match=r"no head for masked.*Name a masked language model with data-augmentation.model"
    ):
        change(model=None)


def test_the_runs_own_model_with_a_head_is_used(change, tmp_path, masked_lm):
    config = tiny_config(tmp_path, model__name=str(masked_lm))
    changed, _ = change(config, model=None)
    assert len(changed.train) > EXAMPLES


def test_no_source_of_neighbours_is_refused(change):
    with pytest.raises(ConfigError, match=r"neighbours_from names no file"):
        change(neighbours="vectors")


def test_tasks_without_labelled_texts(change, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the movie was great fun\n" * 40)
    source = {"model": {"name": str(tiny_model(tmp_path / "lm", "llama"))}, "task": "causal-lm"}
    source |= {"data": {"train": str(text), "max_length": 8}, "engine": {"name": "accelerate", "cpu": True}}
    config = resolve({**source, "out": str(tmp_path / "lm-run")})
    with pytest.raises(ConfigError, match=r"'causal-lm' has no labelled texts to augment: choose .*budget O, O2 or O4"):
        change(config)
    changed, data = change(config, budget="O2")
    assert changed.steps == 6 * len(data.train) // 32 and changed.steps > 0


def test_an_export_made_later_says_what_the_budget_came_to(tmp_path, masked_lm):
    options = {"budget": "A", "model": str(masked_lm), "neighbours": "none", "trials": 2}
    config = tiny_config(tmp_path, {"data-augmentation": options}, train__max_steps=None, train__epochs=1.0)
    run = qpipe.execute(config)
    kept = DataAugmentation(DataAugmentationOptions(**options)).qpipe_export_metadata(run)
    assert (kept["examples"], kept["steps"]) == (len(run.data.train), run.total_steps)
    (run.out / "data-augmentation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data-augmentation.json is not valid JSON .*; repeat the run"):
        DataAugmentation(DataAugmentationOptions(**options)).qpipe_export_metadata(run)


def test_texts_in_a_column_named_like_the_numbers_once_were(change, tmp_path):
    data = tmp_path / "named.jsonl"
    data.write_text('{"example": "the movie great fun", "label": 0}\n{"example": "bad plot", "label": 1}\n' * 8)
    config = tiny_config(tmp_path, data__train=str(data), data__validation_fraction=0.25,
                         data__text_columns=["example"])  # fmt: skip
    changed, original = change(config, trials=2)
    assert len(changed.train) > len(original.train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "B"}, "budget = 'B': Input should be 'O', 'O2', 'O4', 'A' or 'C'"),
        ({"probability": 1.5}, "probability = 1.5"),
        ({"neighbours": "none", "one_piece": "neighbours"}, "no word would get a candidate"),
        ({"neighbours": "none", "neighbours_from": "x"}, "say what kind of file it is"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(PluginError, match=message):
        build_plugin("data-augmentation", DataAugmentation, options)
