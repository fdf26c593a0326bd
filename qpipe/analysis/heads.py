"""Heads: attention maps beside the teacher's, and how far the order within their rows has moved."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qpipe.analysis.attention import attention_maps
from qpipe.analysis.observe import Example, collect
from qpipe.analysis.ranking import cover_length, mean_over_examples, ranking_loss
from qpipe.analysis.session import Session
from qpipe.errors import ConfigError, ModelError
from qpipe.run import Run
from qpipe.types import Json

SHOWN = 32
"""Tokens of a shown map."""


def probabilities(session: Session, run: Run, sample: list[Example]) -> list[list[Tensor]]:
    """Attention after softmax, by layer and example, `[heads, tokens, tokens]`.

    Args:
        session: shows how far it has come.
        run: whose model is looked at.
        sample: examples.

    Raises:
        ConfigError: the model has no attention that could be observed.
    """
    names = [f"{path}:probs" for path in run.instruments.map.attention]
    if not names:
        raise ConfigError(f"{type(run.student).__name__} has no attention that could be observed; leave the part out")
    values = collect(run, names, session.track(sample, "attention, examples"))
    return [values[name] for name in names]


def sentence(run: Run, text: str) -> Example:
    """A sentence as the model reads it.

    Raises:
        ConfigError: the model does not read text.
    """
    tokenizer: Any = run.data.tokenizer
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ConfigError(f"{type(run.student).__name__} does not read text; leave --text out")
    encoded = tokenizer(text, truncation=True, max_length=run.config.data.max_length, return_tensors="pt")
    batch = {name: value.to(run.engine.device) for name, value in encoded.items()}
    return Example(batch, list(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())))


def ranking(session: Session) -> dict[str, Json]:
    """Ranking loss and cover length of every head, means over examples; and maps of one example, the teacher's beside.

    Returns:
        `loss` and `cover`, by layer and head; `layers`, the names of the attention modules; `teacher_layers`, the
        teacher's block, from 1, for each; `tokens`, `maps` and `teacher_maps` of the shown example, by layer and head.

    Raises:
        ModelError: student and teacher have other numbers of heads, depths that do not fit, or blocks that have no
            attention.
        ConfigError: a map of layers does not fit, no attention can be observed, or a model of images is given a text.
    """
    run, teacher, text = session.run, session.teacher, session.request.text
    for model, what in ((run, "the quantized model"), (teacher, "its teacher")):
        blocks, attention = len(model.instruments.map.blocks), len(model.instruments.map.attention)
        if attention != blocks:
            raise ModelError(
                f"{what} has {blocks} blocks and {attention} attention modules; heads are compared block by block, "
                "which takes one in each: leave ranking out of --parts"
            )
    sample = list(session.sample)
    shown = sample[0] if text is None else sentence(run, text)
    ours = probabilities(session, run, [shown, *sample])
    every = probabilities(session, teacher, [shown, *sample])
    theirs = [every[block] for block in session.pairing.blocks]
    if ours[0][0].shape != theirs[0][0].shape:
        raise ModelError(
            f"the quantized model has {ours[0][0].shape[0]} heads and its teacher {theirs[0][0].shape[0]}; heads are "
            "compared one by one"
        )
    pairs = [list(zip(a[1:], b[1:], strict=True)) for a, b in zip(ours, theirs, strict=True)]
    ledger = session.ledger("ranking")
    for number, layer in enumerate(session.track(pairs, "ranking, layers")):
        if str(number) not in ledger:
            moved = [mean_over_examples([f(a, b) for a, b in layer]) for f in (ranking_loss, cover_length)]
            ledger.put(str(number), moved)
    loss, cover = zip(*(ledger[str(number)] for number in range(len(pairs))), strict=True)
    ledger.close()
    return {
        "loss": list(loss),
        "cover": list(cover),
        "layers": list(run.instruments.map.attention),
        "teacher_layers": [block + 1 for block in session.pairing.blocks],
        "tokens": shown.tokens[:SHOWN],
        "maps": attention_maps([layer[:1] for layer in ours], [[]], SHOWN)["maps"],
        "teacher_maps": attention_maps([layer[:1] for layer in theirs], [[]], SHOWN)["maps"],
    }
