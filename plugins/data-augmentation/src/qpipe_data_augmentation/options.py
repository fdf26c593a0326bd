"""Options of `data-augmentation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qpipe import Options

BudgetName = Literal["O", "O2", "O4", "A", "C"]


class AugmentationOptions(Options):
    """How sentences are changed. The defaults are TinyBERT's; what decides the rows is part of their folder's name."""

    model: str | None = Field(
        None, description="masked language model: hub name, folder or `package:` path; default: the run's own model"
    )
    one_piece: Literal["masked-lm", "neighbours"] = Field(
        "masked-lm", description="where candidates for words of one token come from; `neighbours` needs no model"
    )
    neighbours: Literal["vectors", "wordnet", "ppdb", "none"] = Field(
        "vectors", description="where candidates for words of several tokens come from; `none`: they stay as they are"
    )
    neighbours_from: str | None = Field(
        None,
        description="vectors in GloVe's text format, WordNet's `dict` folder, or a file of PPDB or of pairs",
    )
    vectors_limit: int = Field(100_000, gt=1, description="lines read of a vectors file; the most frequent words")
    candidates: int = Field(15, gt=0, description="M: candidates per word")
    probability: float = Field(0.4, gt=0, le=1, description="p: chance that a word is replaced")
    trials: int | None = Field(None, gt=0, description="N: new sentences per sentence; default: as in TinyBERT")
    in_place: bool = Field(
        False, description="as the reference does, leave the last new sentence 1 in place while sentence 2 is varied"
    )
    special_tokens: bool = Field(
        False, description="as the reference does, leave tokens such as [SEP] among the candidates"
    )
    seed: int = Field(0, description="of the choices; not the run's, so that runs with other seeds share the rows")
    batch_size: int = Field(64, gt=0, description="masks per forward pass of the masked language model")
    block: int = Field(64, gt=0, description="examples per file: what an interrupted augmentation may lose")

    @model_validator(mode="after")
    def _has_candidates(self) -> AugmentationOptions:
        if self.neighbours == "none" and self.one_piece == "neighbours":
            raise ValueError("no word would get a candidate: set neighbours, or one_piece: masked-lm")
        if self.neighbours == "none" and self.neighbours_from is not None:
            raise ValueError("neighbours_from is given, but neighbours is none: say what kind of file it is")
        return self


class DataAugmentationOptions(AugmentationOptions):
    """A budget, and how it is filled."""

    budget: BudgetName = Field(
        "A", description="O, O2, O4: the original data, 1, 2, 4 times `train.epochs`; A, C: augmented data"
    )
    folder: str | None = Field(
        None, description="keeps augmented rows, also for other runs; default: `augmented` in the run directory"
    )
