"""The tasks that come with qpipe: GLUE with its official metrics, and general ones for your own data."""

from __future__ import annotations

from collections.abc import Iterable

from qpipe.data import metrics, slots
from qpipe.plugin import Plugin, hookimpl
from qpipe.types import Metric, Task

ACCURACY = Metric("accuracy", metrics.accuracy)
F1 = Metric("f1", metrics.f1)
MACRO_F1 = Metric("macro_f1", metrics.macro_f1)
MATTHEWS = Metric("matthews", metrics.matthews)
PEARSON = Metric("pearson", metrics.pearson)
SPEARMAN = Metric("spearman", metrics.spearman)
MSE = Metric("mse", metrics.mean_squared_error, higher_is_better=False)
PERPLEXITY = Metric("perplexity", metrics.perplexity, higher_is_better=False)
MASKED_ACCURACY = Metric("masked_accuracy", metrics.masked_accuracy)
SEMER = Metric("semer", slots.semer, higher_is_better=False)
SLOT_F1 = Metric("slot_f1", slots.slot_f1)
INTENT_ACCURACY = Metric("intent_accuracy", slots.intent_accuracy)
EXACT_MATCH = Metric("exact_match", slots.exact_match)

GLUE = "nyu-mll/glue"
"""Wang et al., "GLUE: A multi-task benchmark and analysis platform" (2019), table 1 names the metrics."""


def _glue(name: str, columns: tuple[str, ...], measured: tuple[Metric, ...], label_names: tuple[str, ...] = ()) -> Task:
    return Task(
        name=name,
        kind="classification" if label_names else "regression",
        metrics=measured,
        text_columns=columns,
        num_labels=len(label_names) or 1,
        label_names=label_names,
        hub=(GLUE, name),
        splits=("train", "validation_matched" if name == "mnli" else "validation"),
    )


PAIR = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")

TASKS = (
    _glue("cola", ("sentence",), (MATTHEWS,), ("unacceptable", "acceptable")),
    _glue("sst2", ("sentence",), (ACCURACY,), ("negative", "positive")),
    _glue("mrpc", PAIR, (ACCURACY, F1), ("not_equivalent", "equivalent")),
    _glue("stsb", PAIR, (PEARSON, SPEARMAN)),
    _glue("qqp", ("question1", "question2"), (ACCURACY, F1), ("not_duplicate", "duplicate")),
    _glue("mnli", ("premise", "hypothesis"), (ACCURACY,), ("entailment", "neutral", "contradiction")),
    _glue("qnli", ("question", "sentence"), (ACCURACY,), ENTAILED),
    _glue("rte", PAIR, (ACCURACY,), ENTAILED),
    Task("classification", "classification", (ACCURACY, MACRO_F1), ("text",)),
    Task("pair-classification", "classification", (ACCURACY, MACRO_F1), PAIR),
    Task("regression", "regression", (PEARSON, SPEARMAN, MSE), ("text",), num_labels=1),
    Task("image-classification", "image-classification", (ACCURACY, MACRO_F1)),
    Task("causal-lm", "causal-lm", (PERPLEXITY,), ("text",), label_column=""),
    Task("masked-lm", "masked-lm", (PERPLEXITY, MASKED_ACCURACY), ("text",), label_column=""),
    Task(
        "intent-slot",
        "intent-slot",
        (SEMER, SLOT_F1, INTENT_ACCURACY, EXACT_MATCH),
        ("tokens",),
        label_column="intent",
        tag_column="slot_tags",
    ),
)
"""Of the metrics of a task the first one selects the best checkpoint."""


class Tasks(Plugin):
    """The built-in tasks."""

    @hookimpl
    def qpipe_tasks(self) -> Iterable[Task]:
        """Offer the GLUE tasks and the general ones."""
        return TASKS
