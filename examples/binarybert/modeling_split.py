"""BERT whose weights are sums of two: each linear map, and the word embedding, is two of the same shape, added."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification


class Sum(nn.Module):
    """`first(x) + second(x)`, of two modules of one shape."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = self.first(x) + self.second(x)
        return result


def like(module: nn.Module) -> nn.Module:
    """A linear map or an embedding of the same shape.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, module.bias is not None)
    if isinstance(module, nn.Embedding):
        return nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
    raise TypeError(f"only linear maps and embeddings can be split, not {type(module).__name__}")


class SplitBertForSequenceClassification(BertForSequenceClassification):
    """`BertForSequenceClassification` in which the modules that `config.split_modules` names are `Sum`s."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        for name in config.split_modules:
            parent, _, attribute = name.rpartition(".")
            whole = self.get_submodule(name)
            setattr(self.get_submodule(parent), attribute, Sum(like(whole), like(whole)))
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The word embedding; its first half where it is split."""
        words = self.bert.embeddings.word_embeddings
        return words.first if isinstance(words, Sum) else words
