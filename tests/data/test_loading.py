from __future__ import annotations

import bz2
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from qpipe.builtin.tasks import TASKS
from qpipe.data.loading import TaskData, find_task
from qpipe.errors import ConfigError, DataError

Load = Callable[..., TaskData]
Csv = Callable[..., str]
ROWS = ("text,label", "good film,1", "bad film,0", "very good film,1", "very bad,0")


def tokens(data: datasets.Dataset) -> list[list[int]]:
    return [list(row) for row in data["input_ids"]]


def test_classification(load: Load, csv: Csv) -> None:
    path = csv(*ROWS)
    data = load("classification", train=path, validation=path)
    assert set(data.train.column_names) >= {"input_ids", "attention_mask", "labels"}
    assert "text" not in data.train.column_names
    assert list(data.train["labels"]) == [1, 0, 1, 0]
    assert tokens(data.train)[1] == [2, 8, 9, 3]
    assert (data.num_labels, data.label_names) == (2, ("LABEL_0", "LABEL_1"))
    batch = data.collate([data.train[0], data.train[2]])
    assert batch["input_ids"].tolist() == [[2, 7, 9, 3, 0], [2, 10, 7, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 1]
    assert batch["labels"].dtype == torch.int64


def test_padding_and_truncation(load: Load, csv: Csv) -> None:
    path = csv(*ROWS)
    data = load("classification", train=path, validation=path, max_length=4, pad_to_max_length=True)
    assert data.collate([data.train[3]])["input_ids"].shape == (1, 4)
    assert tokens(data.train)[2] == [2, 10, 7, 3]


def test_pairs_and_glue_columns(load: Load, csv: Csv) -> None:
    path = csv("sentence1,sentence2,label", "good,film,0", "bad,film,1", "a,b,2")
    with pytest.raises(
        DataError, match=r"no column 'premise', 'hypothesis'.*: sentence1, sentence2, label.*text_columns"
    ):
        load("mnli", train=path, validation=path)
    data = load("mnli", train=path, validation=path, text_columns=["sentence1", "sentence2"])
    assert tokens(data.train)[0] == [2, 7, 3, 9, 3]
    assert data.num_labels == 3


def test_regression(load: Load, csv: Csv) -> None:
    path = csv("text,score", "good,4.5", "bad,-1")
    data = load("regression", train=path, validation=path, label_column="score")
    assert (data.num_labels, data.label_names) == (1, ())
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [4.5, -1]


def test_labels_in_the_order_given_after_dropping_others(load: Load, csv: Csv) -> None:
    path = csv("text,kind", "good,fresh", ",plot", "bad,rotten", "film,fresh")
    options: dict[str, Any] = {"train": path, "validation": path, "label_column": "kind"}
    data = load("classification", **options, keep_labels=["fresh", "rotten"], labels=["rotten", "fresh"])
    assert data.label_names == ("rotten", "fresh")
    assert list(data.train["labels"]) == [1, 0, 1]
    assert list(load("classification", **options, keep_labels=["fresh", "rotten"]).train["labels"]) == [0, 1, 0]
    with pytest.raises(DataError, match=r"row 1 \(from 0\): label 'plot'.*allowed: rotten, fresh"):
        load("classification", **options, labels=["rotten", "fresh"])


def test_class_label_columns_keep_their_names(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["good", "bad"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    data = load("classification", train=str(path), validation=str(path))
    assert data.label_names == ("no", "yes")
    assert list(data.train["labels"]) == [1, 0]
    turned = load("classification", train=str(path), validation=str(path), labels=["yes", "no"])
    assert list(turned.train["labels"]) == [0, 1]


def test_class_names_that_are_numbers_are_not_positions(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    stars = datasets.ClassLabel(names=["1", "2", "3", "4", "5"])
    features = datasets.Features({"text": datasets.Value("string"), "label": stars})
    rows = {"text": ["awful", "bad", "fair", "good", "great"], "label": [0, 1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    options: dict[str, Any] = {"train": str(path), "validation": str(path)}
    data = load("classification", **options, keep_labels=[1, 5], labels=[1, 5])
    assert len(data.train) == 2 and list(data.train["labels"]) == [0, 1] and data.label_names == ("1", "5")
    whole = load("classification", **options)
    assert list(whole.train["labels"]) == [0, 1, 2, 3, 4] and whole.label_names == ("1", "2", "3", "4", "5")


@pytest.mark.parametrize("task", ["regression", "masked-lm", "causal-lm"])
def test_labels_of_a_task_that_has_no_classes(load: Load, csv: Csv, task: str) -> None:
    path = csv(*ROWS)
    with pytest.raises(ConfigError, match=f"data.labels is for .*{task}"):
        load(task, train=path, validation=path, labels=[0, 1])


@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl", "t.json", "t.csv.bz2", "t.parquet"])
def test_file_formats(load: Load, csv: Csv, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("tsv"):
        path.write_text('text\tlabel\n"good film\t1\nNA\t0\n')
    elif name.endswith("jsonl"):
        path.write_text('{"text": "good film", "label": 1}\n{"text": "NA", "label": 0}\n')
    elif name.endswith("json"):
        path.write_text('[{"text": "good film", "label": 1}, {"text": "NA", "label": 0}]')
    elif name.endswith("bz2"):
        path.write_bytes(bz2.compress(b"text,label\ngood film,1\nNA,0\n"))
    else:
        pq.write_table(pa.table({"text": ["good film", "NA"], "label": [1, 0]}), path)
    before = set(tmp_path.iterdir())
    data = load("classification", train=str(path), validation=str(path))
    assert list(data.train["labels"]) == [1, 0]
    assert tokens(data.train)[0][-3:] == [7, 9, 3]
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache", tmp_path / "model"}


def test_held_out_part_does_not_depend_on_the_seed(load: Load, numbered: Csv) -> None:
    path = numbered(50)
    one, two = (load("classification", train=path, validation_fraction=0.2, seed=seed) for seed in (1, 2))
    assert (len(one.train), len(one.validation)) == (40, 10)
    assert tokens(one.validation) == tokens(two.validation)
    lengths = sorted(len(row) for row in [*tokens(one.train), *tokens(one.validation)])
    assert lengths == list(range(3, 53))


def test_samples(load: Load, numbered: Csv) -> None:
    path = numbered(50)
    options: dict[str, Any] = {"train": path, "validation": path, "max_train_examples": 7, "max_eval_examples": 3}
    data, again = load("classification", **options), load("classification", seed=9, **options)
    assert (len(data.train), len(data.validation)) == (7, 3)
    assert tokens(data.train) == tokens(again.train)
    assert [(len(t) - 3) % 2 for t in tokens(data.train)] == list(data.train["labels"])


def test_folder_with_splits(load: Load, csv: Csv, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    csv(*ROWS, name="set/train.csv")
    csv(*ROWS[:2], name="set/validation.csv")
    data = load("classification", train=str(tmp_path / "set"))
    assert (len(data.train), len(data.validation)) == (4, 1)


def test_folder_with_a_validation_split_of_another_name_than_the_task_has(load: Load, csv: Csv, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    csv("premise,hypothesis,label", "good,film,0", "bad,film,2", "good,bad,1", name="set/train.csv")
    csv("premise,hypothesis,label", "good,film,0", name="set/validation.csv")
    data = load("mnli", train=str(tmp_path / "set"))
    assert (len(data.train), len(data.validation)) == (3, 1)


@pytest.mark.parametrize(("name", "like"), [("set[1]", "set1"), ("se?", "set"), ("s*", "set")])
def test_paths_that_look_like_patterns(load: Load, csv: Csv, tmp_path: Path, name: str, like: str) -> None:
    """They name one file, or none; others whose names match are never read."""
    path, _ = csv(*ROWS, name=f"{name}.csv"), csv("text,label", "c,0", "c,1", name=f"{like}.csv")
    assert tokens(load("classification", train=path, validation=path).train)[1] == [2, 8, 9, 3]
    for folder in (name, like):
        (tmp_path / folder).mkdir()
        csv(*ROWS, name=f"{folder}/train.csv")
    with pytest.raises(DataError, match=r"takes for a pattern; rename the folder"):
        load("classification", train=str(tmp_path / name))
    inside = str(tmp_path / name / "train.csv")
    assert len(load("classification", train=inside, validation=inside).train) == 4


def test_a_language_model_of_blank_lines(load: Load, csv: Csv) -> None:
    with pytest.raises(DataError, match=r"is empty: every text in column 'text' is white space"):
        load("causal-lm", train=csv(" ", "  ", name="blank.txt"), max_length=4)


def test_language_model(load: Load, csv: Csv) -> None:
    path = csv("text", "a b c", " ", "good bad")
    data = load("causal-lm", train=path, validation=path, max_length=4)
    assert tokens(data.train) == [[2, 4, 5, 6], [3, 2, 7, 8]]
    assert (data.num_labels, data.label_names) == (0, ())
    batch = data.collate([data.train[0], data.train[1]])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].min() == 1
    with pytest.raises(DataError, match=r"is empty: its 9 tokens .* data.max_length = 60"):
        load("causal-lm", train=path, validation=path, max_length=60)


def test_language_models_learn_from_texts_with_the_labels_that_are_kept(load: Load, csv: Csv) -> None:
    path = csv("text,kind", "a b c,keep", ",drop", "good bad,keep")
    kept = {"train": path, "validation": path, "max_length": 4}
    data = load("causal-lm", **kept, label_column="kind", keep_labels=["keep"])
    assert tokens(data.train) == [[2, 4, 5, 6], [3, 2, 7, 8]]
    with pytest.raises(ConfigError, match="drops rows by a label: name its column in data.label_column"):
        load("causal-lm", **kept, keep_labels=["keep"])


def test_images_from_bytes_files_and_pixels(load: Load, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "png")
    folder = tmp_path / "vision"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit", "image_size": 8}')
    batches = []
    for name, value in (("raw", pixels.tobytes()), ("file", file.getvalue()), ("struct", {"bytes": file.getvalue()})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"img": [value, value], "label": [0, 1]}), path)
        data = load(
            "image-classification",
            model=str(folder),
            config={"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
            train=str(path),
            validation=str(path),
            text_columns=["img"],
        )
        batches.append(data.collate([data.train[0], data.train[1]]))
    expected = torch.from_numpy((pixels / 255 - 0.5) / 0.25).float()
    for batch in batches:
        assert batch["pixel_values"].shape == (2, 3, 8, 8)
        torch.testing.assert_close(batch["pixel_values"][0], expected)
        assert batch["labels"].tolist() == [0, 1]
    data.tokenizer.save_pretrained(folder)
    again = load("image-classification", model=str(folder), train=str(path), validation=str(path), text_columns=["img"])
    assert torch.equal(again.collate([again.train[0]])["pixel_values"], batches[0]["pixel_values"][:1])


def test_not_an_image(load: Load, model: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"abcd", b"abcd"], "label": [0, 1]}), path)
    with pytest.raises(DataError, match=r"row 0 .*image of 4 bytes"):
        load("image-classification", train=str(path), validation=str(path))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_missing_label_column(load: Load, csv: Csv) -> None:
    with pytest.raises(DataError, match=r"no column 'label'; its columns are: text, stars.*data.label_column"):
        load("classification", train=csv("text,stars", "good,1", "bad,0"))


@pytest.mark.parametrize(("task", "bad", "allowed"), [("rte", 2, "0..1"), ("rte", -1, "0..1"), ("mnli", 3, "0..2")])
def test_label_out_of_range(load: Load, csv: Csv, task: str, bad: int, allowed: str) -> None:
    path = csv("text,label", "good,1", "bad,0", f"film,{bad}")
    with pytest.raises(DataError, match=rf"row 2 \(from 0\): label {bad} .*allowed: {allowed}"):
        load(task, train=path, validation=path, text_columns=["text"])


def test_validation_label_unknown_to_training(load: Load, csv: Csv) -> None:
    validation = csv("text,label", "good,fresh", "bad,awful", name="validation.csv")
    with pytest.raises(DataError, match=r"validation.csv', row 1 .*'awful'.*allowed: fresh, rotten"):
        load("classification", train=csv("text,label", "good,fresh", "bad,rotten"), validation=validation)


def test_integer_labels_with_gaps(load: Load, csv: Csv) -> None:
    path = csv("text,label", "good,1", "bad,2", "film,4")
    with pytest.raises(DataError, match=r"set data.labels: \[1, 2, 4\]"):
        load("classification", train=path)
    assert load("classification", train=path, validation=path, labels=[1, 2, 4]).label_names == ("1", "2", "4")


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_label(load: Load, csv: Csv, tmp_path: Path, task: str, kind: str) -> None:
    path = csv("text,label", "good,1", "bad,0", "film,")
    if kind == "parquet":
        path = str(tmp_path / "t.parquet")
        pq.write_table(pa.table({"text": ["good", "bad", "film"], "label": [1.0, 0.0, float("nan")]}), path)
    with pytest.raises(DataError, match=r"row 2 \(from 0\): the label in column 'label' is missing"):
        load(task, train=path, validation=path)


def test_missing_text(load: Load, csv: Csv) -> None:
    path = csv("text,label", "good,1", ",0")
    with pytest.raises(DataError, match=r"row 1 \(from 0\): column 'text' is missing"):
        load("classification", train=path, validation=path)


def test_regression_label_that_is_text(load: Load, csv: Csv) -> None:
    path = csv("text,label", "good,4.5", "bad,low")
    with pytest.raises(DataError, match=r"row 1 \(from 0\): label 'low' .*not a finite number"):
        load("regression", train=path, validation=path)


@pytest.mark.parametrize("number", ["1e300", "inf"])
def test_regression_label_that_float32_cannot_hold(load: Load, csv: Csv, number: str) -> None:
    path = csv("text,label", "good,4.5", f"bad,{number}")
    with pytest.raises(DataError, match=r"row 1 \(from 0\): label (1e\+300|inf) .*not a finite number in float32"):
        load("regression", train=path, validation=path)


@pytest.mark.parametrize("number", ["0.5", "inf"])
def test_fractions_are_no_classes(load: Load, csv: Csv, number: str) -> None:
    with pytest.raises(DataError, match=rf"numbers such as {number}.*task: regression"):
        load("classification", train=csv("text,label", f"good,{number}", "bad,0"))


@pytest.mark.parametrize("rows", [("text,label",), ("text,label", "good,plot")])
def test_empty_split(load: Load, csv: Csv, rows: tuple[str, ...]) -> None:
    path = csv(*ROWS)
    with pytest.raises(DataError, match="is empty"):
        load("classification", train=csv(*rows, name="none.csv"), validation=path, keep_labels=[0, 1])
    with pytest.raises(DataError, match="is empty"):
        load("classification", train=path, validation=csv(*rows, name="none.csv"), keep_labels=[0, 1])


@pytest.mark.parametrize("task", ["classification", "sst2"])
def test_one_class_only(load: Load, csv: Csv, task: str) -> None:
    path = csv("text,label", "good,0", "bad,0")
    with pytest.raises(DataError, match=r"(only one class|every row has the same class)"):
        load(task, train=path, validation=path, text_columns=["text"])


def test_class_count_that_does_not_fit_the_task(load: Load, csv: Csv) -> None:
    path = csv("sentence,label", "good,x", "bad,y", "film,z")
    with pytest.raises(DataError, match=r"3 classes \(x, y, z\), but task 'sst2' has 2"):
        load("sst2", train=path)
    with pytest.raises(ConfigError, match=r"data.labels has 3 values"):
        load("sst2", train=path, labels=["x", "y", "z"])


def test_unsupported_extension(load: Load, csv: Csv) -> None:
    with pytest.raises(DataError, match=r"unsupported extension; allowed: \.parquet, \.csv"):
        load("classification", train=csv(*ROWS, name="train.xlsx"))


def test_file_that_does_not_exist(load: Load) -> None:
    with pytest.raises(DataError, match=r"'missing/train.csv' does not exist; local paths are relative to"):
        load("classification", train="missing/train.csv")


def test_damaged_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load("classification", train=str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.txt", "train.parquet"])
def test_empty_file(load: Load, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="is empty: it has no rows; give a file with examples"):
        load("classification", train=str(tmp_path / name))


def test_no_data_named(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"set data.train"):
        load("classification")


def test_one_row_cannot_be_split(load: Load, csv: Csv) -> None:
    with pytest.raises(DataError, match=r"set data.validation"):
        load("regression", train=csv("text,label", "good,1"))


def test_no_tokenizer(load: Load, csv: Csv, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer can be loaded.*model.tokenizer"):
        load("classification", train=csv(*ROWS), model=str(tmp_path))


def test_longer_than_the_tokenizer_allows(load: Load, csv: Csv) -> None:
    with pytest.raises(ConfigError, match="at most 128"):
        load("classification", train=csv(*ROWS), max_length=129)


def test_three_text_columns(load: Load, csv: Csv) -> None:
    with pytest.raises(ConfigError, match="one or two columns"):
        load("classification", train=csv(*ROWS), text_columns=["a", "b", "c"])


def test_unknown_task() -> None:
    with pytest.raises(ConfigError, match=r"no task is named 'sst-2'; did you mean 'sst2'.*tasks: causal-lm"):
        find_task({task.name: task for task in TASKS}, "sst-2")


@pytest.mark.parametrize(("name", "asked"), [("some/repo", (None,)), ("some/repo:part-v1", ("part-v1",))])
def test_data_sets_of_the_hub_by_name(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str | None]
) -> None:
    """`owner/name`, or `owner/name:configuration`; its splits are found by their usual names."""
    calls = []

    def hub(*words: str | None) -> datasets.DatasetDict:
        calls.append(words)
        part = datasets.Dataset.from_dict({"text": ["good film", "bad film"], "label": [1, 0]})
        return datasets.DatasetDict(train=part, validation=part.select([1]), test=part)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load("classification", train=name, validation=None)
    assert set(calls) == {("some/repo", *asked)}
    assert (len(data.train), len(data.validation)) == (2, 1)
    assert tokens(data.validation) == [[2, 8, 9, 3]]


def test_glue_tasks_name_integer_labels(load: Load, csv: Csv) -> None:
    """So that exports say what a label is; `data.labels` takes the names or the integers."""
    rows = ("premise,hypothesis,label", "good,film,0", "bad,film,2", "good,bad,1")
    path = csv(*rows)
    data = load("mnli", train=path, validation=path)
    assert data.label_names == ("entailment", "neutral", "contradiction")
    assert list(data.train["labels"]) == [0, 2, 1]
    for labels in (["contradiction", "neutral", "entailment"], [2, 1, 0]):
        assert list(load("mnli", train=path, validation=path, labels=labels).train["labels"]) == [2, 0, 1]
    wrong = csv(*rows, "bad,bad,-1", name="wrong.csv")
    with pytest.raises(DataError, match=r"wrong.csv', row 3 \(from 0\): label -1 .* allowed: 0..2"):
        load("mnli", train=path, validation=wrong)
    kept = load("mnli", train=wrong, validation=wrong, keep_labels=[0, 1, 2])
    assert list(kept.validation["labels"]) == [0, 2, 1]


@pytest.mark.parametrize("spelling", [str, str.upper])
def test_text_labels_have_the_order_of_the_task(load: Load, csv: Csv, spelling: Callable[[str], str]) -> None:
    """F1 of MRPC is that of class 1, `equivalent`."""
    no, yes = spelling("not_equivalent"), spelling("equivalent")
    path = csv("sentence1,sentence2,label", f"good,film,{yes}", f"bad,film,{no}")
    data = load("mrpc", train=path, validation=path)
    assert data.label_names == (no, yes) and list(data.train["labels"]) == [1, 0]
    other = csv("sentence1,sentence2,label", "good,film,yes", "bad,film,no", name="other.csv")
    assert load("mrpc", train=other, validation=other).label_names == ("no", "yes"), "of which nothing is known"


def test_labels_that_repeat(load: Load, csv: Csv) -> None:
    with pytest.raises(ConfigError, match="data.labels repeats a value"):
        load("classification", train=csv(*ROWS), labels=("a", "b", "a"))
