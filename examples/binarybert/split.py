"""Split the ternary weights of a run into binary ones: the second half of BinaryBERT.

    python examples/binarybert/split.py RUN FOLDER

RUN is a finished run of `qpipe launch` with a BERT classifier whose ternary weights have no `clip`. In FOLDER each
of its ternary modules is the sum of two. Their 1-bit weights add up to the ternary one, so that the model, quantized
with `binary` at the granularity that the ternary weights had, starts where the run ended.

Bai et al., "BinaryBERT: Pushing the Limit of BERT Quantization" (ACL 2021), section 3.2.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from qpipe import QTensor, split_to_binary
from qpipe.stages.trained import restore

HERE = Path(__file__).resolve().parent
MODEL = "modeling_split.SplitBertForSequenceClassification"


def ternary_codes(run: Any) -> dict[str, QTensor]:
    """Codes by name of the module whose weight has three levels.

    Raises:
        SystemExit: there are none.
    """
    found = {}
    for site, quantizer in run.instruments.quantizers().items():
        path, _, slot = site.rpartition(":")
        if slot == "weight" and run.plan.sites[site].quantizer == "ternary-twn":
            found[path] = quantizer.encode(run.student.get_submodule(path).weight.detach())
    if not found:
        raise SystemExit(f"{run.out} has no weights of the quantizer ternary-twn; train them first")
    return found


def split_state(state: Mapping[str, Tensor], codes: Mapping[str, QTensor]) -> dict[str, Tensor]:
    """The state dict of the split model: halves of weights, of biases, and all else as it is.

    Args:
        state: of the model in full precision.
        codes: of the weights to be split, by module.

    Raises:
        SystemExit: a weight is no sum of two binary ones.
    """
    result = {}
    for name, value in state.items():
        path, _, kind = name.rpartition(".")
        if path not in codes:
            result[name] = value
            continue
        try:
            halves = split_to_binary(value, codes[path]) if kind == "weight" else (value / 2, value / 2)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from error
        result |= {f"{path}.{side}.{kind}": half for side, half in zip(("first", "second"), halves, strict=True)}
    return result


def split(source: Path, folder: Path) -> Path:
    """Write the split model of a run, with the code that it needs.

    Args:
        source: run directory.
        folder: is made; must not exist.

    Raises:
        SystemExit: the folder exists, the model is no BERT classifier, or its weights cannot be split.
    """
    if folder.exists():
        raise SystemExit(f"{folder} exists; name another folder")
    run = restore(source)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source / "model")
    if model.config.model_type != "bert":
        raise SystemExit(f"{source} holds a {model.config.model_type}; only BERT classifiers can be split")
    codes = ternary_codes(run)
    made: Any = get_class_from_dynamic_module(MODEL, HERE)
    model.config.split_modules = sorted(codes)
    halves = made(model.config)
    halves.load_state_dict(split_state(model.state_dict(), codes))
    made.register_for_auto_class("AutoModelForSequenceClassification")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    halves.save_pretrained(temporary)
    run.data.tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    print(f"{folder}: {len(codes)} modules are two each")
    return folder


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with torch.no_grad():
        split(given.run, given.folder)


if __name__ == "__main__":
    main()
