"""Layers: the squared distance of every layer's output, and of its attention's, to the teacher's.

Kim et al. (EACL 2023): hidden states in figure 2b; attention outputs in figure 4b, by the authors' code those after
residual and LayerNorm, which the feed-forward network receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from qpipe.analysis.observe import Example, See, example_of, observing
from qpipe.analysis.session import Session
from qpipe.errors import ModelError
from qpipe.run import Run
from qpipe.stages.calibrate import inference
from qpipe.stages.teaching import extra_inputs
from qpipe.types import Json, SignalKind

Outputs = Mapping[str, list[Tensor]]
HIDDEN: frozenset[SignalKind] = frozenset({"hidden_states"})
AFTER_ATTENTION = ("attention_output", "ffn_input")
"""Roles of sites: the attention's output by itself, and what it becomes."""


KEPT_EVERY = 64
"""Examples after which the sums so far are kept, so that an interrupted analysis goes on from there."""


@dataclass
class Distances:
    """Sums of squares over examples and numbers of elements, by layer."""

    errors: list[float] = field(default_factory=list)
    powers: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add one example's tensors, by layer; layers may differ in shape.

        Raises:
            ModelError: student and teacher differ in shape.
        """
        pairs = list(zip(student, teacher, strict=True))
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise ModelError(
                    f"the quantized model gives {tuple(ours.shape)} where its teacher gives {tuple(theirs.shape)}; "
                    "compare models of one width"
                )
        none = [0] * len(pairs)
        errors = [float((a.double() - b.double()).square().sum()) for a, b in pairs]
        powers = [float(b.double().square().sum()) for _, b in pairs]
        self.errors = [x + y for x, y in zip(self.errors or none, errors, strict=True)]
        self.powers = [x + y for x, y in zip(self.powers or none, powers, strict=True)]
        self.counts = [x + a.numel() for x, (a, _) in zip(self.counts or none, pairs, strict=True)]

    def means(self) -> dict[str, Json]:
        """`mse` by layer, and `power`, the mean square of the teacher."""
        sums = (("mse", self.errors), ("power", self.powers))
        return {name: [total / n for total, n in zip(totals, self.counts, strict=True)] for name, totals in sums}


def layers(session: Session) -> dict[str, Json]:
    """Mean squared error to the teacher over all elements of some examples, none of which is padded.

    Nothing of the teacher stands in for the student's own values.

    Returns:
        `examples`, their number; `hidden_states` (what the first block receives and every block returns, one more than
        blocks), `attention_output` (what the output projections of attention return) and `ffn_input` (what that becomes
        after residual and normalisation, where the feed-forward networks receive it): each with `mse` and `power`,
        lists over layers, the last two empty where not every block of both models is known to have such a site.
        `states`: the teacher's hidden state for each of the student's; `layers`: its block, from 1, for each of the
        student's.

    Raises:
        ModelError: width does not fit.
    """
    run, wanted, pairing, ledger = session.run, session.request.examples, session.pairing, session.ledger("layers")
    count = len(run.data.validation) if wanted is None else min(wanted, len(run.data.validation))
    kinds = ("hidden_states", *AFTER_ATTENTION)
    before: dict[str, Any] = ledger["sums"] if "sums" in ledger else {"examples": 0, **{kind: {} for kind in kinds}}
    distances = {kind: Distances(**before[kind]) for kind in kinds}
    theirs_of = dict.fromkeys(AFTER_ATTENTION, pairing.blocks) | {"hidden_states": list(pairing.states)}
    for number in session.track(range(count), "layers, examples"):
        if number < before["examples"]:
            continue
        example = example_of(run, number)
        ours, theirs = _outputs(run, example), _outputs(session.teacher, example)
        for kind, total in distances.items():
            if kind == "hidden_states" or _in_every_block(run, ours[kind], session.teacher, theirs[kind]):
                total.add(ours[kind], [theirs[kind][index] for index in theirs_of[kind]])
        if (number + 1) % KEPT_EVERY == 0:
            ledger.put("sums", {"examples": number + 1, **{kind: asdict(total) for kind, total in distances.items()}})
    ledger.close()
    means = {kind: total.means() for kind, total in distances.items()}
    where = {"states": list(pairing.states), "layers": [block + 1 for block in pairing.blocks]}
    return {"examples": count, **means, **where}


def _in_every_block(run: Run, ours: Sequence[Tensor], teacher: Run, theirs: Sequence[Tensor]) -> bool:
    pairs = ((run, ours), (teacher, theirs))
    return all(len(found) == len(model.instruments.map.blocks) > 0 for model, found in pairs)


def _outputs(run: Run, example: Example) -> Outputs:
    """Tensors of one example by kind and layer."""
    seen: dict[str, Tensor] = {}
    states: dict[tuple[str, int], Tensor] = {}
    instruments = run.instruments
    names = {kind: instruments.map.sites.get(kind, ()) for kind in AFTER_ATTENTION}
    names["attention_output"] = tuple(f"{path}:output" for path in instruments.map.attention_output)
    instruments.want(HIDDEN, states)
    with observing(run, {name: _keep(seen, name) for sites in names.values() for name in sites}), inference(run):
        output = run.student(**example.batch, **extra_inputs(HIDDEN))
    instruments.take_outputs(output, HIDDEN, states)
    instruments.want(frozenset(), {})
    hidden = [states["hidden_states", layer] for layer in range(len(states))]
    return {"hidden_states": hidden, **{kind: [seen[name] for name in sites] for kind, sites in names.items()}}


def _keep(seen: dict[str, Tensor], name: str) -> See:
    return lambda value: seen.__setitem__(name, value)
