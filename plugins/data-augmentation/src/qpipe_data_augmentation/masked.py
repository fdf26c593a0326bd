"""Candidates for a word from a masked language model, many masks per forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpipe_data_augmentation.words import Encoded

WORD_STARTS = ("Ġ", "▁")
"""What byte-level and SentencePiece vocabularies put before a token that begins a word."""


@dataclass(frozen=True)
class Request:
    """One masked word.

    Attributes:
        sentence: its sentence, as the model sees it.
        place: position of the token that is masked.
    """

    sentence: Encoded
    place: int


class MaskedLM:
    """A masked language model and its tokenizer.

    Args:
        model: takes `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`; its output has
            `logits`. In evaluation mode, on `device`.
        tokenizer: fast, with a mask token.
        limit: longest input in tokens.
        device: where the model is.
        batch_size: masks per forward pass.
        special: leave special tokens among the candidates.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, limit: int, device: torch.device, batch_size: int, special: bool = False
    ) -> None:
        self.model, self.tokenizer, self.limit = model, tokenizer, limit
        self.device, self.batch_size = device, batch_size
        self._mask, self._pad = int(tokenizer.mask_token_id), int(tokenizer.pad_token_id or 0)
        self._texts = _word_texts(tokenizer, special)

    def candidates(self, requests: Sequence[Request], count: int) -> list[list[str]]:
        """For each request the `count` tokens of largest logit, without those that go on a word. Largest first.

        What comes out does not depend on how many processes there are, as batches are made of `requests` only.
        """
        found: list[list[str]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].sentence.ids))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, ids in zip(chosen, self._forward([requests[i] for i in chosen], count), strict=True):
                found[index] = [self._texts[i] for i in ids if i in self._texts]
        return found

    def _forward(self, batch: Sequence[Request], count: int) -> list[list[int]]:
        length = max(len(request.sentence.ids) for request in batch)
        inputs = {"input_ids": self._padded([r.sentence.ids for r in batch], length, self._pad)}
        inputs["attention_mask"] = self._padded([[1] * len(r.sentence.ids) for r in batch], length, 0)
        types = [r.sentence.types for r in batch if r.sentence.types is not None]
        if types:
            inputs["token_type_ids"] = self._padded(types, length, 0)
        rows = torch.arange(len(batch), device=self.device)
        places = torch.tensor([r.place for r in batch], device=self.device)
        inputs["input_ids"][rows, places] = self._mask
        with torch.inference_mode(), only_positions(self.model, places):
            logits: Tensor = self.model(**inputs).logits
        logits = logits[:, 0] if logits.shape[1] == 1 and length > 1 else logits[rows, places]
        ids: list[list[int]] = logits.topk(min(count, logits.shape[-1])).indices.tolist()
        return ids

    def _padded(self, rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=self.device)


def _word_texts(tokenizer: Any, special: bool) -> Mapping[int, str]:
    """The text of every token that begins a word, by id."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    model = tokenizer.backend_tokenizer.model
    specials = {} if not special else {i: t for t, i in vocabulary.items() if i in set(tokenizer.all_special_ids)}
    plain = {token: i for token, i in vocabulary.items() if i not in set(tokenizer.all_special_ids)}
    continuing = getattr(model, "continuing_subword_prefix", None)
    if continuing:
        return specials | {i: token for token, i in plain.items() if not token.startswith(continuing)}
    words = {i: tokenizer.convert_tokens_to_string([t]).strip() for t, i in plain.items() if t.startswith(WORD_STARTS)}
    return specials | {i: text for i, text in words.items() if text}


@contextmanager
def only_positions(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Within, the output embedding (the largest matrix product of small models) sees one position of each example.

    Where a model has no such module, or calls it with something else than `[batch, tokens, hidden]`, nothing changes.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(head, nn.Module):
        yield
        return

    def pick(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        if hidden.dim() != 3 or hidden.shape[0] != len(places):
            return None
        return (hidden[torch.arange(len(places), device=places.device), places].unsqueeze(1), *inputs[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
