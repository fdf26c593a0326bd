"""Masked language models: which tokens are hidden follows from the seed, the epoch and the row alone."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from qpipe.data.sources import SPLIT_SEED
from qpipe.data.text import Collate
from qpipe.errors import ConfigError

ROW = "row"
"""Column that numbers the examples, so that the masking of one does not depend on who else is in its batch."""


def number_rows(data: datasets.Dataset) -> datasets.Dataset:
    """The pieces without labels, which the masking makes, and with their numbers in column `row`."""
    return data.remove_columns("labels").add_column(ROW, np.arange(len(data)))


class Masking:
    """Hides tokens as transformers' `DataCollatorForLanguageModeling` does: of the chosen 15 % (by default) of tokens
    80 % become the mask token, 10 % a random one, and 10 % stay; special tokens are never chosen.

    Devlin et al., "BERT: Pre-training of deep bidirectional transformers for language understanding" (2019), 3.1. Every
    epoch chooses other tokens, as in Liu et al., "RoBERTa" (2019), 4.1.

    Args:
        tokenizer: needs a mask token.
        probability: of a token to be chosen, 0..1.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Any, probability: float) -> None:
        if tokenizer.mask_token is None:
            raise ConfigError(
                "the tokenizer has no mask token, which masked language models need; set model.name (or "
                "model.tokenizer) to an encoder such as BERT, or use task: causal-lm"
            )
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def training(self, seed: int, epoch: int) -> Collate:
        """Makes the batches of one epoch: `input_ids`, `attention_mask` and `labels`, each `[batch, tokens]` int64.

        Labels are -100 where nothing is predicted. The global random state is left alone.
        """
        return lambda features: self._batch(features, seed, (epoch,))

    def evaluation(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch whose masking is the same at every evaluation and for every seed."""
        return self._batch(features, SPLIT_SEED, ())

    def _batch(self, features: list[dict[str, Any]], seed: int, key: tuple[int, ...]) -> dict[str, Tensor]:
        rows = [
            self._hide(feature, np.random.SeedSequence(seed, spawn_key=(*key, feature[ROW]))) for feature in features
        ]
        ids, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _hide(self, feature: dict[str, Any], source: np.random.SeedSequence) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([feature["input_ids"]], dtype=torch.int64)
        self._collator.generator = torch.Generator().manual_seed(int(source.generate_state(1, np.uint64)[0] >> 1))
        hidden: tuple[Tensor, Tensor] = self._collator.torch_mask_tokens(ids, torch.isin(ids, self._special))
        return hidden
