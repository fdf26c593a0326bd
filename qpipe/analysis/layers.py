"""Layers: the squared distance of every layer's output to the teacher's.

Kim et al. (EACL 2023), figures 2b and 4b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from qpipe.analysis.observe import Example, See, observing
from qpipe.analysis.teacher import layer_map
from qpipe.errors import ModelError
from qpipe.run import Run
from qpipe.stages.calibrate import inference
from qpipe.stages.teaching import extra_inputs
from qpipe.types import Json, SignalKind

Outputs = Mapping[str, list[Tensor]]
HIDDEN: frozenset[SignalKind] = frozenset({"hidden_states"})


class Distances:
    """Sums of squares over examples."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.powers: list[float] = []
        self.count = 0

    def add(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add one example's tensors, by layer; all of one shape.

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
        self.count += pairs[0][0].numel() if pairs else 0
        errors = [float((a.double() - b.double()).square().sum()) for a, b in pairs]
        powers = [float(b.double().square().sum()) for _, b in pairs]
        self.errors = [x + y for x, y in zip(self.errors or [0.0] * len(pairs), errors, strict=True)]
        self.powers = [x + y for x, y in zip(self.powers or [0.0] * len(pairs), powers, strict=True)]

    def means(self) -> dict[str, Json]:
        """`mse` by layer, and `power`, the mean square of the teacher."""
        return {name: [v / self.count for v in sums] for name, sums in (("mse", self.errors), ("power", self.powers))}


def layer_errors(run: Run, teacher: Run, sample: Iterable[Example]) -> dict[str, Json]:
    """Mean squared error to the teacher over all elements of some examples, none of which is padded.

    Nothing of the teacher stands in for the student's own values.

    Args:
        run: on one process, with its quantizers in place.
        teacher: see `Session.teacher`.
        sample: examples.

    Returns:
        `hidden_states` (what the blocks receive and return, one more than blocks) and `attention_output` (what the
        output projections of attention return; empty where none is known): each with `mse` and `power`.
        `layers`: the teacher's block, from 1, for each of the student's.

    Raises:
        ModelError: depth or width do not fit.
    """
    blocks = layer_map(run, teacher)
    hidden, attention = Distances(), Distances()
    for example in sample:
        ours, theirs = _outputs(run, example), _outputs(teacher, example)
        hidden.add(ours["hidden"], [theirs["hidden"][i] for i in (0, *(block + 1 for block in blocks))])
        if ours["attention"]:
            attention.add(ours["attention"], [theirs["attention"][block] for block in blocks])
    return {
        "hidden_states": hidden.means(),
        "attention_output": attention.means() if attention.count else {"mse": [], "power": []},
        "layers": [block + 1 for block in blocks],
    }


def _outputs(run: Run, example: Example) -> Outputs:
    seen: dict[str, Tensor] = {}
    states: dict[tuple[str, int], Tensor] = {}
    instruments = run.instruments
    names = [f"{path}:output" for path in instruments.map.attention_output]
    instruments.want(HIDDEN, states)
    with observing(run, {name: _keep(seen, name) for name in names}), inference(run):
        output = run.student(**example.batch, **extra_inputs(HIDDEN))
    instruments.take_outputs(output, HIDDEN, states)
    instruments.want(frozenset(), {})
    hidden = [states["hidden_states", layer] for layer in range(len(states))]
    return {"hidden": hidden, "attention": [seen[name] for name in names]}


def _keep(seen: dict[str, Tensor], name: str) -> See:
    return lambda value: seen.__setitem__(name, value)
