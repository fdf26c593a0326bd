"""Whether a named teacher fits this run: its tokens and labels, and the architecture of what starts from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from qpipe.config import RunConfig
from qpipe.data.images import PROCESSOR_FILES
from qpipe.data.loading import TaskData
from qpipe.data.locate import locate
from qpipe.errors import ConfigError, ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
EXAMPLES = 16
"""Training texts that both tokenizers must cut into the same tokens."""


SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "image_size",
    "patch_size",
    "depths",
    "hidden_sizes",
)
"""What has to agree for the weights of one model to be those of another; configurations have some of them."""


def require_same_architecture(config: RunConfig, teacher: str) -> None:
    """Refuse to start the student from a named teacher that is another architecture: `model.name` would mean nothing.

    Args:
        config: resolved configuration.
        teacher: a folder, or a name on the hub.

    Raises:
        ConfigError: a size differs, and `teacher.init_student` is on.
    """
    if not config.teacher.init_student:
        return
    model = config.model
    ours = _read_config(locate(model.name), model.trust_remote_code, model.revision, model.config)
    theirs = _read_config(teacher, model.trust_remote_code, None, model.config)
    if ours is None or theirs is None:
        return
    pairs = {key: (getattr(ours, key, None), getattr(theirs, key, None)) for key in SIZES}
    differ = [f"{key} {mine} and {other}" for key, (mine, other) in pairs.items() if mine != other]
    if differ:
        raise ConfigError(
            f"model.name {model.name} and teacher.name {config.teacher.name} are different architectures "
            f"({', '.join(differ)}), and the student would be a copy of the teacher: set teacher.init_student: false "
            "to train model.name, or name the teacher's model in model.name too (model.keep_layers takes some of its "
            "layers)"
        )


def _read_config(
    model: str, trust_remote_code: bool, revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Any:
    """A model's configuration; None if it cannot be read: loading the model says what is wrong."""
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        return AutoConfig.from_pretrained(model, **hub, **(overrides or {}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_same_language(config: RunConfig, teacher: str, data: TaskData) -> None:
    """Refuse a teacher that would read other tokens, or number its labels in another way: it would teach nonsense.

    A teacher's folder without a tokenizer is not checked for tokens. Label names that are mere numbers, on either side,
    are not compared; where the data have only numbers, the names are those that the model has for them.

    Args:
        config: resolved configuration.
        teacher: a folder, or a name on the hub.
        data: the processed data of the run.

    Raises:
        ModelError: tokens or labels differ; says where.
    """
    remote = config.model.trust_remote_code
    theirs = load_tokenizer(teacher, remote) if hasattr(data.tokenizer, "get_vocab") else None
    if theirs is not None:
        columns = () if data.text is None else (data.text.split.data[name][:EXAMPLES] for name in data.text.columns)
        compare_tokenizers(data.tokenizer, theirs, teacher, list(zip(*columns, strict=True)))
    processor = load_own_processor(teacher) if hasattr(data.tokenizer, "image_mean") else None
    if processor is not None:
        compare_processors(data.tokenizer, processor, teacher)
    theirs_named = label_names(teacher, remote)
    if theirs_named and _unnamed(data.label_names) and config.model.weights == "pretrained":
        own = label_names(locate(config.model.name), remote, config.model.revision)
        numbers = [int(name.removeprefix("LABEL_")) for name in data.label_names]  # data.labels may have reordered them
        if sorted(numbers) == list(range(len(own))):
            compare_labels([own[number] for number in numbers], theirs_named, teacher, numbers)
    compare_labels(data.label_names, theirs_named, teacher)


def label_names(model: str, trust_remote_code: bool, revision: str | None = None) -> tuple[str, ...]:
    """The names of a model's labels in the order of their ids; none if its configuration cannot be read."""
    config = _read_config(model, trust_remote_code, revision)
    labels = (None if config is None else config.id2label) or {}
    return tuple(str(labels[key]) for key in sorted(labels))


def has_processor(folder: Path) -> bool:
    """Whether a folder has an image processor."""
    return any((folder / file).is_file() for file in PROCESSOR_FILES)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(teacher: str, trust_remote_code: bool) -> Any:
    """The teacher's tokenizer, None if it has none."""
    folder = Path(teacher)
    if folder.is_dir() and not has_tokenizer(folder):
        return None  # transformers would make an empty one up
    try:
        return AutoTokenizer.from_pretrained(teacher, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def compare_tokenizers(ours: Any, theirs: Any, teacher: str, rows: Sequence[Sequence[str]] = ()) -> None:
    """Every token of ours must have the same id in theirs, and texts must become the same inputs.

    Args:
        ours: the run's tokenizer.
        theirs: the teacher's.
        teacher: what messages call it.
        rows: texts, or pairs of them.

    Raises:
        ModelError: they differ.
    """
    advice = "name a teacher with the tokenizer of model.name, or set model.tokenizer to that of the teacher"
    known = theirs.get_vocab()
    for token, number in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != number:
            has = f"gives it {known[token]}" if token in known else "does not have it"
            raise ModelError(
                f"token {token!r} has id {number} in this run, and the tokenizer of teacher {teacher} {has}; {advice}"
            )
    for row in rows:
        here, there = ours(*row), theirs(*row)
        if here["input_ids"] != there["input_ids"]:
            raise ModelError(f"the tokenizer of teacher {teacher} cuts {row[0][:60]!r} into other tokens; {advice}")
        for name in there.keys() - {"input_ids", "attention_mask"}:
            if any(there[name]) and here.get(name) != there[name]:
                raise ModelError(
                    f"teacher {teacher} is used to {name}, which the tokenizer of this run does not give for "
                    f"{row[0][:60]!r}, so that it would read something else; {advice}"
                )


def load_own_processor(teacher: str) -> Any:
    """The image processor in the teacher's folder, None if it has none."""
    if not has_processor(Path(teacher)):
        return None
    try:
        return AutoImageProcessor.from_pretrained(teacher)
    except (OSError, ValueError):
        return None


def compare_processors(ours: Any, theirs: Any, teacher: str) -> None:
    """Both models must see the same pixels.

    Raises:
        ModelError: sizes, scale or statistics differ.
    """
    for key in ("do_resize", "size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
        here, there = getattr(ours, key, None), getattr(theirs, key, None)
        alike = list(here) == list(there) if isinstance(here, list | tuple) and there is not None else here == there
        if not alike:
            raise ModelError(
                f"images have {key} {here} in this run, and {there} for teacher {teacher}, which would see something "
                "else; name a teacher with the image processor of model.name, or set model.tokenizer to the teacher"
            )


def compare_labels(ours: Sequence[str], theirs: Sequence[str], teacher: str, numbers: Sequence[int] = ()) -> None:
    """Labels must have the same names in the same order; capitals do not matter. Other numbers of labels pass here.

    Args:
        ours: names of the run's labels.
        theirs: those of the teacher's.
        teacher: what messages call it.
        numbers: what the data hold in the place of each name, where the names are those that the model has for it:
            perhaps of another task, so that only another order of the same names is an error.

    Raises:
        ModelError: they differ.
    """
    if len(ours) != len(theirs) or _unnamed(ours) or _unnamed(theirs):
        return
    _refuse_another_order(ours, theirs, f"teacher {teacher}", numbers)
    if numbers or _folded(ours) == _folded(theirs):
        return
    raise ModelError(
        f"the labels of this run are {', '.join(ours)}, those of teacher {teacher} {', '.join(theirs)}; name a teacher "
        "of this task, or correct id2label in the config.json of the teacher"
    )


def require_own_labels(config: RunConfig, data: TaskData) -> None:
    """Refuse data that number their labels otherwise than the fine-tuned model does that is to be quantized.

    Names that are not the same pass: they may be other words for them.

    Args:
        config: resolved configuration.
        data: the processed data of the run.

    Raises:
        ModelError: the model has the same names in another order.
    """
    named = label_names(locate(config.model.name), config.model.trust_remote_code, config.model.revision)
    if len(named) == len(data.label_names):
        _refuse_another_order(data.label_names, named, f"model {config.model.name}")


def _refuse_another_order(ours: Sequence[str], theirs: Sequence[str], whose: str, numbers: Sequence[int] = ()) -> None:
    here, there = _folded(ours), _folded(theirs)
    if here == there or sorted(here) != sorted(there):
        return
    positions = [here.index(name) for name in there]
    order = ", ".join(str(numbers[position]) if numbers else ours[position] for position in positions)
    raise ModelError(
        f"the labels of this run are {', '.join(ours)}, those of {whose} {', '.join(theirs)}: the same in another "
        f"order; set data.labels: [{order}]"
    )


def _folded(names: Sequence[str]) -> list[str]:
    return [name.casefold() for name in names]


def _unnamed(names: Sequence[str]) -> bool:
    return all(name.removeprefix("LABEL_").isdigit() for name in names)
