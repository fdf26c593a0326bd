"""The small frozen objects that hooks return. Nothing here imports torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qpipe.plugin import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qpipe.quant.estimators import RangeEstimator
    from qpipe.quant.quantizer import Quantizer
    from qpipe.run import Step

Json = Any
"""Anything that `json.dumps` accepts."""

Slot = Literal[
    "weight",
    "input",
    "output",
    "sum",
    "stream",
    "query",
    "key",
    "value",
    "raw_scores",
    "scores",
    "probs",
    "context",
]
"""A place at a module where a tensor passes.

`weight`, `input` and `output` are the module's own. `sum`, at an embedding, is the sum of its output and of those added
before it. `stream`, at a normalisation, is the residual stream that enters it, changed for the residual connection too
(`input` changes what the normalisation alone receives). The others are stages of attention.
"""

MAP_SLOTS: tuple[Slot, ...] = ("raw_scores", "scores", "probs")
"""Slots whose tensors are `[batch, heads, tokens, tokens]`."""
HEADS_FIRST_SLOTS: tuple[Slot, ...] = ("query", "key", "value", *MAP_SLOTS)
"""Slots whose tensors are `[batch, heads, tokens, ...]`; in those of all others tokens are at axis 1."""

ACTIVATION_SLOTS: frozenset[str] = frozenset(get_args(Slot)) - {"weight"}
"""What a quantizer that can serve any activation gives as its slots."""

SignalKind = Literal["logits", "hidden_states", "scores", "visible", "probs", "context", "attention_output"]
"""What can be captured of student and teacher; see `Signals`."""


class TapStage(IntEnum):
    """Order in which functions at one site run; it never depends on who registered first."""

    OBSERVE = 0
    REPLACE = 1
    QUANTIZE = 2


@dataclass(frozen=True)
class Site:
    """One place where a tensor can be quantized.

    Attributes:
        path: qualified name of the module, as in `named_modules()`.
        slot: which tensor at that module.
        module_type: class name of the module before qpipe changed it, such as `Linear`.
        shape: shape of the weight for slot `weight`, else empty.
        by_name: True at normalisations, activation functions and whole blocks: patterns select them only if they spell
            the module's own name, so that `{block}.*:input` stays the inputs of linear maps.
    """

    path: str
    slot: Slot
    module_type: str
    shape: tuple[int, ...] = ()
    by_name: bool = False

    @property
    def name(self) -> str:
        """`path:slot`, the form used in rules and plans."""
        return f"{self.path}:{self.slot}"


@dataclass(frozen=True)
class Rule:
    """Quantize every site that matches a pattern.

    Of several matching rules the last one wins; but of one source (a preset, a plugin, the configuration), a rule wins
    over a later one that selects all its sites and more.

    Attributes:
        site: `fnmatch` pattern over `path:slot`. `{block}` stands for every transformer block's path, `{embedding}` for
            the input embedding, `{head}` for the output head, `{norm}` for every normalisation; the role of an
            activation, such as `{ffn_sum}`, for its whole sites, and `{outputs}` for those of all roles. `{block[0]}`
            and `{ffn_sum[-1]}` are the first and the last of them.
        quantizer: name of a quantizer, or `none` to leave matching sites in full precision.
        options: options of that quantizer.
    """

    site: str
    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizerKind:
    """A quantizer on offer.

    Attributes:
        name: what rules call it.
        build: makes one `Quantizer` from validated options; called once per site.
        options: model of the options; unknown keys are refused.
        slots: the slots it can serve.
        summary: one line for `qpipe plugins show`.
    """

    name: str
    build: Callable[[Any], Quantizer]
    options: type[Options]
    slots: frozenset[str]
    summary: str = ""


@dataclass(frozen=True)
class RangeEstimatorKind:
    """A range estimator on offer, for activations whose range is set, or begins, with what calibration sees.

    Attributes:
        name: what the options `range` and `init` of quantizers call it.
        build: makes one `RangeEstimator` from validated options; called once per site.
        options: model of the options, given as `range_options` or `init_options`; unknown keys are refused.
        summary: one line for the docs.
    """

    name: str
    build: Callable[[Any], RangeEstimator]
    options: type[Options] = Options
    summary: str = ""


@dataclass(frozen=True)
class Loss:
    """A term of the training loss.

    Attributes:
        name: unique among all plugins; the key in logs.
        fn: takes the `Step` (batch, student output, captured signals) and returns a scalar.
        weight: factor, or a function of the optimizer step that returns it.
        replaces: names of other terms that this one stands in for, such as `("task",)`.
    """

    name: str
    fn: Callable[[Step], Tensor]
    weight: float | Callable[[int], float] = 1.0
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightLoss:
    """A penalty on weight tensors, evaluated once per optimizer step inside the module that owns the weight.

    Attributes:
        name: unique among all plugins; the key in logs.
        fn: takes one float weight tensor (any shape) and returns a scalar; with `moments`, takes the `Moments` of
            several weights and returns a value for each. Must be differentiable.
        weight: factor in the total loss.
        applies: takes a module path and says whether its weight is penalised.
        reduction: how the values of several weights combine.
        every: evaluate in every n-th optimizer step only, with n times the weight.
        stored: True if `fn` is meant for the form in which a quantizer stores the weight, where that is another tensor
            than the weight (`Quantizer.master`); a penalty on ordinary weights is refused there.
        moments: True if `fn` is a function of mean and central moments alone. Such a penalty costs one read of a weight
            and one more term in its gradient.
    """

    name: str
    fn: Callable[[Any], Tensor]
    weight: float
    applies: Callable[[str], bool]
    reduction: Literal["mean", "sum"] = "mean"
    every: int = 1
    stored: bool = False
    moments: bool = False


@dataclass(frozen=True)
class Signals:
    """What a plugin wants captured in this step; the core takes the union over plugins.

    `scores` are pre-softmax and pre-mask, [batch, heads, queries, keys]; `visible` tells which of them the softmax
    sees, boolean, [batch, 1 or heads, queries, keys]: no padded keys, in decoders no later ones, and none outside a
    sliding window; `probs` post-softmax, before dropout;
    `context` [batch, tokens, heads, head size]; `attention_output` the output of the attention's output projection,
    [batch, tokens, hidden]; `hidden_states` what the first block receives and what every block returns, the last one
    too before any normalisation that follows the blocks. `scores` and `probs` make the model build attention maps, so
    ask for them only while they are needed.

    `evaluation` are signals of the teacher that taps added with `in_evaluation` need in evaluations during training.
    Such an evaluation measures something else than the student by itself: it is logged, and never counts as the best
    or as the run's result.
    """

    teacher: frozenset[SignalKind] = frozenset()
    student: frozenset[SignalKind] = frozenset()
    evaluation: frozenset[SignalKind] = frozenset()

    def __or__(self, other: Signals) -> Signals:
        return Signals(self.teacher | other.teacher, self.student | other.student, self.evaluation | other.evaluation)


@dataclass(frozen=True)
class TrainingPhase:
    """A first part of the training that is a training of its own.

    It has its own learning-rate schedule, of the form of `train.schedule`, and ends with its last weights. What follows
    starts from them with a fresh optimizer. Only evaluations in the last phase can be the best one.

    Attributes:
        name: unique among all plugins.
        steps: optimizer steps.
        learning_rate: its highest one; None: `train.learning_rate`.
        warmup: part of its steps in which the learning rate rises, 0..1; None: `train.warmup`.
        start: its first optimizer step; set by the core, which puts phases one after another in plugin order.
    """

    name: str
    steps: int
    learning_rate: float | None = None
    warmup: float | None = None
    start: int = 0

    @property
    def stop(self) -> int:
        """The first optimizer step after it."""
        return self.start + self.steps


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that train with settings of their own. A parameter claimed by two groups is an error.

    Attributes:
        name: unique among all plugins.
        match: takes a parameter name and the parameter; True if it belongs to the group.
        lr_scale: factor on the learning rate.
        weight_decay: weight decay of the group; None keeps the configured one.
    """

    name: str
    match: Callable[[str, torch.nn.Parameter], bool]
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class CalibrationPass:
    """One pass over calibration batches, in evaluation mode without gradients.

    Every process runs the same batches, those of one process, so that what is found does not depend on their number.
    Batches of more examples than `train.eval_batch_size` come in parts; `context.calibration_batch` of the run's
    instruments is the number of the batch under way.

    Attributes:
        name: unique among all plugins.
        batches: number of batches to run.
        start: called before the first batch.
        finish: called after the last one, on every process; let the others take over what process 0 has found
            (`run.engine.broadcast_tensor`).
    """

    name: str
    batches: int
    start: Callable[[], None]
    finish: Callable[[], None]


@dataclass(frozen=True)
class ModelMap:
    """Where the parts of a model are, by module path.

    Attributes:
        blocks: transformer blocks in order; empty for models without any.
        attention: attention modules in order (those handed to the attention interface).
        attention_inputs: per block, the paths of the query, key and value projections.
        attention_output: per block, the path of the attention's output projection.
        embedding: path of the input embedding, or None.
        head: paths of the output head's modules, without normalisations.
        norms: paths of all normalisations, in order.
        embeddings: tables whose outputs are added up, in the order of addition; the first is `embedding`. Each between
            the first and the last has a site `sum`.
        sites: names of the sites where an operation's output passes, by role and, within a role, in order. In every
            model with blocks, `ffn_input`, `ffn_output` and `ffn_sum` have one site for each block: what the
            feed-forward network receives, what it returns, and its sum with the residual. docs/sites.md lists the
            roles.
    """

    blocks: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    attention_inputs: tuple[tuple[str, str, str], ...] = ()
    attention_output: tuple[str, ...] = ()
    embedding: str | None = None
    head: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def role(self, site: str) -> str:
        """The role of a site `path:slot`; its slot if it has none."""
        return next((role for role, names in self.sites.items() if site in names), site.rpartition(":")[2])


@dataclass(frozen=True)
class Metric:
    """A number computed from predictions.

    Attributes:
        name: such as `accuracy`.
        fn: takes predictions [examples, ...] and references [examples, ...] as numpy arrays.
        higher_is_better: direction, for choosing the best checkpoint.
    """

    name: str
    fn: Callable[[Any, Any], float]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """What is learned: columns, head, collation and metrics.

    Attributes:
        name: what the configuration calls it.
        kind: decides the model class and the loss.
        text_columns: column names that are tokenized, one or two; empty for images.
        label_column: name of the label column; empty for language models.
        tag_column: name of the column with one tag for each word; empty unless words are labelled.
        num_labels: size of the head; 1 for regression; 0 if it has to be read from the data.
        label_names: what integer labels 0, 1, ... stand for where the data do not say; empty if nothing is known.
        metrics: computed at evaluation; the first one selects the best checkpoint.
        hub: `(repository, configuration)` on the hub, used when no data are named.
        splits: names of the training and evaluation split.
    """

    name: str
    kind: Literal["classification", "regression", "image-classification", "causal-lm", "masked-lm", "intent-slot"]
    metrics: tuple[Metric, ...]
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    tag_column: str = ""
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    splits: tuple[str, str] = ("train", "validation")


@dataclass(frozen=True)
class Exporter:
    """A file format that a run can be exported to.

    Attributes:
        name: what `export.format` calls it.
        write: writes the packed model of a run, an `ExportRecord`, into an empty folder. Where the target needs other
            operations than the model's, `write_program` does.
        check: returns a reason for each planned site that the format cannot hold; called before training.
        summary: one line for the docs and error messages.
        stored_bytes: takes a parameter name, a `PackedWeight` and the export's dtype, and returns the bytes that the
            weight takes in the file with its scales; None where that is what codes and scales need without padding.
        loads_with_transformers: the folder is a transformers model, so that only what one of transformers' auto classes
            makes can be written; known before training.
        loading_problem: takes the student, the planned sites and the student's parameters and saved buffers by name,
            and returns why what would be written could not be loaded, None if it can; called before training, after
            `check` has found nothing.
    """

    name: str
    write: Callable[[Any, Path], None]
    check: Callable[[Any], Iterable[str]]
    summary: str = ""
    stored_bytes: Callable[[str, Any, torch.dtype], int] | None = None
    loads_with_transformers: bool = False
    loading_problem: Callable[[Any, Any, Mapping[str, torch.Tensor]], str | None] | None = None


@dataclass(frozen=True)
class ReportSection:
    """A section of the HTML report.

    Attributes:
        title: heading.
        html: body; plain HTML, no scripts or links to other files.
        order: sections are sorted by this number, then by title.
    """

    title: str
    html: str
    order: int = 100
