"""An augmentation from the first example to the last, by any number of processes."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qpipe import DataError
from qpipe_data_augmentation.blocks import Blocks, share
from qpipe_data_augmentation.loading import content, load_masked_lm, load_neighbours, load_tokenizer
from qpipe_data_augmentation.options import AugmentationOptions
from qpipe_data_augmentation.sentences import Candidates, augmented
from qpipe_data_augmentation.words import Splitter, replaceable

logger = logging.getLogger("qpipe.data-augmentation")

LOOKED_AT = 1000
"""Examples among which there has to be a word that can be replaced."""
FORMAT = 2
"""Goes up when the same options give other rows or columns."""


class Processes(Protocol):
    """What is needed of `qpipe.Engine`."""

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all processes."""

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0."""


@dataclass(frozen=True)
class Source:
    """The examples to augment, and with what.

    Attributes:
        columns: one or two columns of text.
        texts: takes a range of examples and gives their texts, `[examples][columns]`.
        examples: how many there are.
        options: how.
        trials: N, new sentences per sentence.
        model: name of the masked language model; where none is used, of the model whose tokenizer finds the words.
        hub: `revision` and `trust_remote_code` of the model.
    """

    columns: tuple[str, ...]
    texts: Callable[[range], Sequence[Sequence[str]]]
    examples: int
    options: AugmentationOptions
    trials: int
    model: str
    hub: dict[str, Any]

    def candidates(self, device: torch.device) -> Candidates:
        """Load what gives candidates.

        Raises:
            QpipeError: a file or a model is not what the options say.
        """
        options, model = self.options, None
        tokenizer = load_tokenizer(self.model, options.one_piece == "masked-lm", **self.hub)
        neighbours = load_neighbours(options)
        if options.one_piece == "masked-lm":
            model = load_masked_lm(self.model, options, device, **self.hub)
        return Candidates(Splitter.like(tokenizer), neighbours, model, options.candidates)

    def decisive(self) -> dict[str, Any]:
        """Everything that decides the rows: two sources that agree in it give equal rows."""
        texts = hashlib.sha256()
        for start in range(0, self.examples, 1000):
            batch = self.texts(range(start, min(start + 1000, self.examples)))
            texts.update(json.dumps([list(row) for row in batch]).encode())
        fields = set(AugmentationOptions.model_fields) - {"model", "neighbours_from", "trials"}
        return {
            "format": FORMAT,
            "texts": texts.hexdigest(),
            "columns": list(self.columns),
            "model": [content(self.model), self.hub],
            "neighbours_from": content(self.options.neighbours_from),
            "trials": self.trials,
            **self.options.model_dump(mode="json", include=fields),
        }


def augment(source: Source, folder: Path, processes: Processes) -> Blocks:
    """Write what is missing of the augmented rows, into a folder of `folder` named by what decides them. Collective.

    Each example draws from a generator of its own, and each file is made by one process alone, so that neither the
    number of processes nor an interruption changes a row.

    Raises:
        QpipeError: files, model or options do not fit, found before the first example; or the disk is full.
    """
    about = processes.broadcast_object(source.decisive() if processes.rank == 0 else None)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    blocks = Blocks(folder / key, source.columns, source.examples, source.options.block)
    missing: list[int] = processes.broadcast_object(blocks.missing() if processes.rank == 0 else None)
    if missing:
        candidates = source.candidates(processes.device)
        require_words(source, candidates.splitter)
        if processes.rank == 0:
            blocks.describe(about)
            kept = len(blocks.paths) - len(missing)
            logger.info("augmenting %d examples into %s (%d of %d files there)", source.examples, blocks.folder,
                        kept, len(blocks.paths))  # fmt: skip
        mine = share(missing, processes.rank, processes.world_size)
        with progress(len(mine), processes.rank == 0) as advance:
            for number in mine:
                blocks.write(number, rows_of(source, candidates, blocks.range(number)))
                advance()
    processes.barrier()
    return blocks


def require_words(source: Source, splitter: Splitter) -> None:
    """Refuse texts without words that could be replaced: all that they would give is themselves.

    Raises:
        DataError: none of the first examples has any.
    """
    some = source.texts(range(min(source.examples, LOOKED_AT)))
    if not any(replaceable(word) for row in some for text in row for word in splitter.words(text)):
        raise DataError(
            f"data-augmentation: the first {len(some)} examples have no word that could be replaced, that is, one of "
            "the letters a to z that is no English stop word; use a budget on the original data (O, O2, O4)"
        )


def rows_of(source: Source, candidates: Candidates, examples: range) -> Iterator[tuple[int, list[str]]]:
    """`(example, texts)` for every row of some examples."""
    options = source.options
    texts = source.texts(examples)
    found = candidates.find([text for row in texts for text in row])
    for example, row in zip(examples, texts, strict=True):
        rng = random.Random(f"{options.seed}:{example}")
        for new in augmented(row, found, source.trials, options.probability, rng, options.in_place):
            yield example, new


@contextmanager
def progress(files: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on terminals, else a line for every tenth of the files; gives what counts one file more."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("augment"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("augment", total=files)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if shown and not console.is_terminal and done * 10 // files > (done - 1) * 10 // files:
                logger.info("augmented %d of %d files", done, files)

        yield advance
