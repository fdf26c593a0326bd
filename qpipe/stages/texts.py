"""What a model of texts takes from the tokenizer that it is used with, and how long its texts may be."""

from __future__ import annotations

from typing import Any

from torch import nn

from qpipe.data.loading import TaskData
from qpipe.errors import ConfigError
from qpipe.types import Task

ONE_OUTPUT = ("classification", "regression")
"""Kinds of tasks in which a decoder answers at the last token that is no padding."""


def fit_to_texts(model: nn.Module, task: Task, data: TaskData, max_length: int) -> None:
    """Let a model know the padding token, in place, and refuse texts that are longer than it can read.

    A decoder that classifies looks for the last token that is no padding; models such as LLaMA have no padding token of
    their own. It becomes part of the model's configuration, and so of its exports.

    Args:
        model: as loaded.
        task: of the run.
        data: of the run; where it has no tokenizer, there is nothing to do.
        max_length: `data.max_length`.

    Raises:
        ConfigError: the model has fewer positions, or embeddings of fewer tokens than the tokenizer has.
    """
    if not hasattr(data.tokenizer, "pad_token_id"):
        return
    words, known = tokens_in_texts(data.tokenizer), vocabulary(model)
    if known is not None and words > known:
        raise ConfigError(
            f"the tokenizer has {words} tokens and {type(model).__name__} embeddings of {known}; set model.tokenizer "
            "to the model's own"
        )
    padding = data.tokenizer.pad_token_id
    config: Any = getattr(model, "config", None)
    if task.kind in ONE_OUTPUT and padding is not None and config is not None and _is_decoder(model):
        config.pad_token_id = config.get_text_config().pad_token_id = padding
    most = positions(model)
    if most is not None and max_length > most:
        raise ConfigError(
            f"data.max_length is {max_length}, but {type(model).__name__} has learned {most} positions; lower it to "
            f"{most} or less"
        )


def _is_decoder(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def tokens_in_texts(tokenizer: Any) -> int:
    """One more than the largest id that texts can get.

    Special tokens that are added for other uses do not count: Gemma's tokenizer has one for images, for which its text
    models have no embedding.
    """
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    used = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    unused = {number for number, token in added.items() if token.special and number not in used}
    return 1 + max((number for number in tokenizer.get_vocab().values() if number not in unused), default=-1)


def vocabulary(model: Any) -> int | None:
    """Tokens that a model has embeddings of; None if it does not say."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    found = getattr(embedding, "num_embeddings", None)
    return None if found is None else int(found)


def positions(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions can read; None for others, whose positions are computed."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            # RoBERTa counts from behind the padding token's place, OPT from its own offset.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - first - int(getattr(module, "offset", 0)))
    return min(found, default=None)
