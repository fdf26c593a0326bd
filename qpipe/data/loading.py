"""From a configuration and a task to data that a model can be called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from qpipe.config import DataConfig, RunConfig
from qpipe.data import joint
from qpipe.data import labels as labelling
from qpipe.data.images import image_collate, image_rows, load_processor
from qpipe.data.masking import Masking, number_rows
from qpipe.data.sources import Split, read_splits
from qpipe.data.text import (
    Collate,
    Texts,
    chunk,
    chunk_collate,
    load_tokenizer,
    padding_collate,
    require_padding,
    tokenize,
)
from qpipe.errors import ConfigError, suggest
from qpipe.types import Task


@dataclass(frozen=True)
class TaskData:
    """The processed splits of a task.

    Attributes:
        train: model inputs and `labels`; images are still encoded and become pixels in `collate`.
        validation: likewise.
        collate: makes a batch from rows: tensors by the argument names of the model's forward.
        tokenizer: tokenizer or image processor, saved beside the model; None if there is none.
        num_labels: size of the head; 1 for regression, 0 for language models.
        label_names: names of the classes in the order of their ids; empty unless classes are predicted.
        train_collate: takes seed and epoch, and gives what makes the batches of that epoch; None: `collate` does.
        decode: turns arrays of predictions and references into those that the metrics take; None: they are the same.
        text: the training examples before tokenization; None where they are no labelled texts.
        steps: optimizer steps of the training, where the data decide it; None: `train.epochs` does.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    collate: Collate
    tokenizer: Any
    num_labels: int
    label_names: tuple[str, ...]
    train_collate: Callable[[int, int], Collate] | None = None
    decode: Callable[[Any, Any], tuple[Any, Any]] | None = None
    text: Texts | None = None
    steps: int | None = None


def find_task(tasks: Mapping[str, Task], name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; suggests the nearest and lists all.
    """
    if name not in tasks:
        raise ConfigError(f"no task is named {name!r}{suggest(name, tasks)}; tasks: {', '.join(sorted(tasks))}")
    return tasks[name]


def load_in_order(config: RunConfig, task: Task, names: Sequence[str]) -> TaskData:
    """`load_data` with the classes in the order in which a trained model has them.

    Where nothing says the order, a later version may find another one in the same data.

    Args:
        config: of the run that trained the model.
        task: of the run.
        names: the model's classes in the order of their ids; none where it has no names.
    """
    data = load_data(config, task)
    if data.label_names == tuple(names) or set(data.label_names) != set(names) or config.data.labels is not None:
        return data
    return load_data(config.model_copy(update={"data": config.data.model_copy(update={"labels": tuple(names)})}), task)


def load_data(config: RunConfig, task: Task) -> TaskData:
    """Read, filter, label and tokenize the data of a run.

    The result depends on `config.data`, `config.model` and the task, not on `config.seed`, the process or the number
    of processes; nothing is written into the folder of the data.

    Raises:
        ConfigError: a data set, tokenizer or label list cannot be what the configuration says.
        DataError: a file, column, label or text is wrong, or a split is empty.
    """
    if config.data.labels is not None and task.kind not in ("classification", "image-classification"):
        raise ConfigError(
            f"data.labels is for classes, and task {task.name!r} ({task.kind}) has none of these; leave it out"
        )
    if task.kind in ("causal-lm", "masked-lm"):
        return _language(config, task)
    if task.kind == "intent-slot":
        return _joint(config, task)
    train, validation = read_splits(config.data, task)
    inputs, label_column = _input_columns(config.data, task), config.data.label_column or task.label_column
    train = _filtered(train, inputs, label_column, config.data, task)
    names: tuple[str, ...] = ()
    if task.kind != "regression":
        names = labelling.class_table(train, label_column, config.data.labels, task)
    if validation is None:
        train, validation = train.hold_out(config.data.validation_fraction)
    else:
        validation = _filtered(validation, inputs, label_column, config.data, task)
    train_labels, validation_labels = _labels(train, validation, label_column, names)
    train, train_labels = _sample(train, train_labels, config.data.max_train_examples)
    validation, validation_labels = _sample(validation, validation_labels, config.data.max_eval_examples)
    num_labels = len(names) or 1
    if task.kind == "image-classification":
        processor = load_processor(config.model)
        return TaskData(
            image_rows(train, inputs[0], train_labels),
            image_rows(validation, inputs[0], validation_labels),
            image_collate(processor),
            processor,
            num_labels,
            names,
        )
    length = config.data.max_length
    tokenizer = load_tokenizer(config.model, length)
    require_padding(tokenizer)
    text = Texts(train, inputs, train_labels, tokenizer, length)
    return TaskData(
        text.encode(train.data, train_labels),
        tokenize(validation, inputs, tokenizer, length, validation_labels),
        padding_collate(tokenizer, length if config.data.pad_to_max_length else None),
        tokenizer,
        num_labels,
        names,
        text=text,
    )


def _input_columns(config: DataConfig, task: Task) -> tuple[str, ...]:
    """The columns that are read: one or two of text, or one of images (default `image`)."""
    columns = config.text_columns or task.text_columns or ("image",)
    most = 2 if task.kind in ("classification", "regression") else 1
    if not 1 <= len(columns) <= most:
        raise ConfigError(
            f"task {task.name!r} reads {'one column' if most == 1 else 'one or two columns'}, but data.text_columns "
            f"names {len(columns)}: {', '.join(columns)}"
        )
    return columns


def _filtered(split: Split, inputs: tuple[str, ...], label_column: str, config: DataConfig, task: Task) -> Split:
    split.require(inputs, f"data.text_columns (now {list(inputs)})")
    split.require([label_column], f"data.label_column (now {label_column!r})")
    kept = labelling.keep_rows(split, label_column, config.keep_labels)
    kept.require_rows()
    return labelling.name_integers(kept, label_column, task.label_names)


def _labels(
    train: Split, validation: Split, column: str, names: tuple[str, ...]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Class ids, or numbers where there are no class names."""
    if not names:
        return labelling.encode_numbers(train, column), labelling.encode_numbers(validation, column)
    ids = labelling.encode_classes(train, column, names)
    labelling.require_two_classes(train, column, ids, names)
    return ids, labelling.encode_classes(validation, column, names)


def _sample(split: Split, labels: np.ndarray[Any, Any], size: int | None) -> tuple[Split, np.ndarray[Any, Any]]:
    positions = Split(split.data, split.source, np.arange(len(split.data))).sample(size).rows
    return split.select(positions), labels[positions]


def _with_kept_labels(split: Split, config: DataConfig) -> Split:
    """The rows whose label is wanted, of texts that have one: language models learn from no label, but of some texts.

    Raises:
        ConfigError: labels are to be kept of no column.
    """
    if config.keep_labels is None:
        return split
    if config.label_column is None:
        raise ConfigError(
            "data.keep_labels drops rows by a label: name its column in data.label_column, or leave keep_labels out"
        )
    split.require([config.label_column], f"data.label_column (now {config.label_column!r})")
    return labelling.keep_rows(split, config.label_column, config.keep_labels)


def _language(config: RunConfig, task: Task) -> TaskData:
    train, validation = read_splits(config.data, task)
    (column,) = _input_columns(config.data, task)
    train = _with_kept_labels(train, config.data)
    validation = None if validation is None else _with_kept_labels(validation, config.data)
    if validation is None:
        train, validation = train.hold_out(config.data.validation_fraction)
    tokenizer = load_tokenizer(config.model, config.data.max_length)
    pieces = []
    for split, most in ((train, config.data.max_train_examples), (validation, config.data.max_eval_examples)):
        split.require([column], f"data.text_columns (now {[column]})")
        data = chunk(split, column, tokenizer, config.data.max_length)
        if task.kind == "masked-lm":
            data = number_rows(data)
        pieces.append(Split(data, split.source, np.arange(len(data))).sample(most).data)
    if task.kind == "causal-lm":
        return TaskData(pieces[0], pieces[1], chunk_collate, tokenizer, 0, ())
    masking = Masking(tokenizer, config.data.mask_probability)
    return TaskData(pieces[0], pieces[1], masking.evaluation, tokenizer, 0, (), masking.training)


def _joint(config: RunConfig, task: Task) -> TaskData:
    data = config.data
    (words,), intent = _input_columns(data, task), data.label_column or task.label_column
    tags = data.tag_column or task.tag_column
    train, validation = read_splits(data, task)
    parts = train.hold_out(data.validation_fraction) if validation is None else (train, validation)
    rows = []
    for split, most in zip(parts, (data.max_train_examples, data.max_eval_examples), strict=True):
        split.require([tags], f"data.tag_column (now {tags!r})")
        rows.append(joint.read_rows(_filtered(split, (words,), intent, data, task).sample(most), words, tags, intent))
    names = rows[0].names()
    # Labels that only the validation split has cannot be predicted; they count as errors, as they do in use.
    unseen = tuple(name for name in rows[1].names() if name not in names)
    tokenizer = load_tokenizer(config.model, data.max_length, add_prefix_space=True)
    require_padding(tokenizer)
    joint.require_leading_special(tokenizer)
    train_rows, validation_rows = (joint.tokenize_words(r, names + unseen, tokenizer, data.max_length) for r in rows)
    return TaskData(
        train_rows,
        validation_rows,
        joint.joint_collate(tokenizer, data.max_length if data.pad_to_max_length else None),
        tokenizer,
        len(names),
        names,
        decode=joint.decoder(names + unseen),
    )
