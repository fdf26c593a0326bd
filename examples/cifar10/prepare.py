"""Make a model folder of a ResNet checkpoint for CIFAR-10, such as those of akamaster/pytorch_resnet_cifar10 on GitHub.

    python examples/cifar10/prepare.py CHECKPOINT FOLDER [--labels FILE]

CHECKPOINT is a safetensors file, or what `torch.save` wrote: a state dict, or a mapping with one under `state_dict`.
Any depth of 6 n + 2 is taken; the shortcuts must have no weights (option A). FOLDER then loads in transformers and
qpipe, with `trust_remote_code`.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTImageProcessorPil
from transformers.dynamic_module_utils import get_class_from_dynamic_module

HERE = Path(__file__).resolve().parent
MODEL = "modeling_cifar_resnet.CifarResNetForImageClassification"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, without the prefix that data-parallel training leaves."""
    if path.suffix == ".safetensors":
        state: Mapping[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of `CifarResNetForImageClassification`."""
    result = {}
    for name, tensor in state.items():
        head = re.fullmatch(r"linear\.(weight|bias)", name)
        result[f"classifier.{head[1]}" if head else f"resnet.{name}"] = tensor
    return result


def depth_of(state: Mapping[str, Tensor]) -> int:
    """6 n + 2, where n is the number of blocks of each stage."""
    blocks = {
        name.partition(".conv1.weight")[0] for name in state if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", name)
    }
    return 2 * len(blocks) + 2


def make_model(state: Mapping[str, Tensor], labels: tuple[str, ...]) -> Any:
    """The network with these weights, which says where its code is.

    Raises:
        SystemExit: the tensors are not those of such a network.
    """
    classes = len(state.get("linear.weight", labels))
    if classes != len(labels):
        raise SystemExit(f"the checkpoint has {classes} classes, but {len(labels)} are named; name them with --labels")
    made: Any = get_class_from_dynamic_module(MODEL, HERE)
    try:
        config = made.config_class(
            depth=depth_of(state),
            width=state["conv1.weight"].shape[0],
            id2label=dict(enumerate(labels)),
            label2id={name: index for index, name in enumerate(labels)},
        )
        model = made(config)
        missing, unexpected = model.load_state_dict(renamed(state), strict=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise SystemExit(f"this is no ResNet for CIFAR with shortcuts of option A: {error}") from error
    wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
    if wrong:
        raise SystemExit(f"this is no ResNet for CIFAR with shortcuts of option A: {wrong[0]} is missing, or too much")
    made.config_class.register_for_auto_class()
    made.register_for_auto_class("AutoModelForImageClassification")
    return model


def prepare(checkpoint: Path, folder: Path, labels: tuple[str, ...] = CIFAR10) -> Path:
    """Write the folder: weights, configuration, code, and how images are prepared.

    Args:
        checkpoint: see above.
        folder: is made, or must be empty.
        labels: names of the classes in the order of their ids.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; name another folder")
    model = make_model(read(checkpoint), labels)
    model.save_pretrained(folder)
    config = model.config
    size = {"height": config.image_size, "width": config.image_size}
    ViTImageProcessorPil(size=size, image_mean=config.image_mean, image_std=config.image_std).save_pretrained(folder)
    licence = checkpoint.parent / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, folder / "LICENSE")
    return folder


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=Path, help="file with one class name a line; default: those of CIFAR-10")
    given = parser.parse_args()
    labels = tuple(given.labels.read_text().split()) if given.labels else CIFAR10
    print(prepare(given.checkpoint, given.folder, labels))


if __name__ == "__main__":
    main()
