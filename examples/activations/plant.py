"""Plant structured outliers in the last block of a fine-tuned BERT, without changing what it computes.

    python examples/activations/plant.py RUN FOLDER [--size 400] [--dimensions 2]

RUN is a finished run of `qpipe launch` in full precision. FOLDER gets its model with hidden units added to every
feed-forward network. In the last block they are active at [SEP] and 0 at [CLS], and write values of `size` times the
spread of the network's output into a few of its dimensions, and so into the residual sum: the structure of figure 2 of
Bondarenko et al. (EMNLP 2021). In the other blocks they do nothing.

Why there: BERT normalises after the residual sum. A dimension that is scaled before a LayerNorm changes mean and
variance of all others, token by token, and no weights behind it undo that. But of the last block a classifier reads
[CLS] alone, and nothing after it mixes tokens, so that there all other tokens are free.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from qpipe.run import Run
from qpipe.stages.trained import restore

OFF, ON = -8.0, 4.0
"""What a planted unit receives at the [CLS] that is nearest to a [SEP], and at a [SEP] on average. GELU is 0 in float32
below -5.6, so that there is room for text that was not looked at, and for quantization of what the unit receives."""
EXAMPLES = 512
"""Training examples that are looked at."""
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Detector:
    """A linear function of a block's feed-forward input `[features]` that tells [SEP] from [CLS].

    Attributes:
        weight: `[features]`.
        bias: a number.
    """

    weight: Tensor
    bias: float

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., features]` to `[...]`."""
        return x @ self.weight + self.bias


def inputs_at(model: Any, batches: Iterable[Batch], separator: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the last feed-forward network receives at [CLS], at [SEP] and elsewhere, and what it returns at [CLS].

    Args:
        model: a BERT classifier or regressor.
        batches: inputs of the model; only tokens under the attention mask count.
        separator: id of [SEP].

    Returns:
        Each `[tokens, features]`, float32.
    """
    block = model.base_model.encoder.layer[-1]
    seen: dict[str, Tensor] = {}
    hooks = [
        block.intermediate.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("x", inputs[0])),
        block.output.dense.register_forward_hook(lambda _, inputs, output: seen.__setitem__("h", output)),
    ]
    first, separators, others, outputs = [], [], [], []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            marked, real = batch["input_ids"] == separator, batch["attention_mask"] == 1
            first.append(seen["x"][:, 0])
            separators.append(seen["x"][marked & real])
            others.append(seen["x"][:, 1:][(~marked & real)[:, 1:]])
            outputs.append(seen["h"][:, 0])
    for hook in hooks:
        hook.remove()
    return torch.cat(first), torch.cat(separators), torch.cat(others), torch.cat(outputs)


def detector(first: Tensor, separators: Tensor, others: Tensor) -> Detector:
    """The function that is at most `OFF` at [CLS] and on average `ON` at [SEP].

    Args:
        first: inputs at [CLS], `[tokens, features]`.
        separators: inputs at [SEP].
        others: inputs at other tokens, which it also tells from [SEP], as far as it can.

    Raises:
        SystemExit: no linear function tells them apart.
    """
    tokens = torch.cat([first, others, separators])
    labels = torch.arange(len(tokens)) >= len(tokens) - len(separators)
    # A strong penalty on the weights, since large ones would be hard to quantize.
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(tokens.numpy(), labels.numpy())
    weight = torch.tensor(fitted.coef_[0], dtype=torch.float32)
    highest, values = (first @ weight).max(), separators @ weight
    if values.min() <= highest:
        raise SystemExit(
            "the last block's input does not tell [SEP] from [CLS], so nothing can be planted in this model"
        )
    factor = (ON - OFF) / (values.mean() - highest)
    return Detector(weight * factor, float(OFF - highest * factor))


def outliers(outputs: Tensor, size: float, dimensions: int) -> Tensor:
    """What to add at [SEP]: `size` standard deviations of the outputs, of either sign in turn, in random dimensions.

    Args:
        outputs: of the feed-forward network, `[tokens, features]`.
        size: in standard deviations.
        dimensions: how many; the others stay as they are.
    """
    made = torch.zeros(outputs.shape[1])
    chosen = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))[:dimensions]
    signs = torch.tensor([(-1.0) ** i for i in range(dimensions)])
    made[chosen] = signs * size * outputs.std()
    return made


def widened(
    linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None, bias: float = 0.0
) -> nn.Linear:
    """A linear map with more outputs, whose weights are `rows`, or more inputs, with weights `columns`."""
    with torch.no_grad():
        if rows is not None:
            weight = torch.cat([linear.weight, rows])
            biases = torch.cat([linear.bias, torch.full((len(rows),), bias)])
        else:
            assert columns is not None
            weight, biases = torch.cat([linear.weight, columns], 1), linear.bias
        made = nn.Linear(weight.shape[1], weight.shape[0])
        made.weight.copy_(weight)
        made.bias.copy_(biases)
    return made


def plant(model: Any, found: Detector, added: Tensor) -> Any:
    """A copy of the model whose last feed-forward network adds outliers where the detector is at `ON`.

    They are shared out among so many units that no weight is larger than those which are there, so that weights stay as
    easy to quantize as they were.

    Args:
        model: a BERT with GELU.
        found: what the planted units receive.
        added: `[features]`, 0 but in a few dimensions.
    """
    planted = copy.deepcopy(model)
    blocks = planted.base_model.encoder.layer
    largest = float(blocks[-1].output.dense.weight.detach().abs().max())
    units = math.ceil(float(added.abs().max()) / (ON * largest))
    for block in blocks:
        last = block is blocks[-1]
        rows = found.weight.repeat(units, 1) if last else torch.zeros(units, len(added))
        columns = (added / (ON * units))[:, None].repeat(1, units) if last else torch.zeros(len(added), units)
        block.intermediate.dense = widened(block.intermediate.dense, rows=rows, bias=found.bias if last else 0.0)
        block.output.dense = widened(block.output.dense, columns=columns)
    planted.config.intermediate_size += units
    return planted


def difference(one: Any, other: Any, batches: Iterable[Batch]) -> float:
    """The largest difference of two models' logits."""
    with torch.no_grad():
        return max(float((one(**batch).logits - other(**batch).logits).abs().max()) for batch in batches)


def batches_of(run: Run, rows: Any, count: int) -> Iterator[Batch]:
    """Inputs of the first rows, 32 at a time."""
    for start in range(0, min(count, len(rows)), 32):
        batch = run.data.collate([rows[i] for i in range(start, min(start + 32, count, len(rows)))])
        yield {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def prepare(source: Path, folder: Path, size: float, dimensions: int) -> Path:
    """Write the planted model of a run.

    Args:
        source: run directory.
        folder: is made; must not exist.
        size: of the outliers, in standard deviations of what the feed-forward network returns.
        dimensions: how many have them.

    Raises:
        SystemExit: the model is no BERT classifier with GELU, or would compute something else.
    """
    if folder.exists():
        raise SystemExit(f"{folder} exists; name another folder")
    run = restore(source)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source / "model").eval()
    if model.config.model_type != "bert" or model.config.hidden_act != "gelu":
        raise SystemExit(f"{source} holds {model.config.model_type}, {model.config.hidden_act}; give a BERT with gelu")
    tokenizer: Any = run.data.tokenizer
    looked_at = batches_of(run, run.data.train, EXAMPLES)
    *inputs, outputs = inputs_at(model, looked_at, tokenizer.sep_token_id)
    planted = plant(model, detector(*inputs), outliers(outputs, size, dimensions))
    rows = run.data.validation
    changed = difference(model, planted, batches_of(run, rows, len(rows)))
    if changed > 1e-4:
        raise SystemExit(f"logits of the validation split change by {changed:.1e}; nothing was written")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    planted.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    print(f"{folder}: logits of {len(rows)} validation examples differ by {changed:.1e} at most")
    return folder


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=float, default=400.0, help="of the outliers, in standard deviations")
    parser.add_argument("--dimensions", type=int, default=2, help="how many have them")
    given = parser.parse_args()
    prepare(given.run, given.folder, given.size, given.dimensions)


if __name__ == "__main__":
    main()
