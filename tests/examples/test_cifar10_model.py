"""`examples/cifar10`: the network is the one that the published weights belong to, and checkpoints become models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .conftest import LABELS, SIDE, random_state


def load(folder: Path):
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits in evaluation mode, from the published names and the paper's section 4.2 with shortcuts of option A."""

    def norm(name: str, y: Tensor) -> Tensor:
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5).sqrt()
        shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp_min(0)
    for path in sorted(name.removesuffix(".conv1.weight") for name in state if name.endswith("0.conv1.weight")):
        weight = state[f"{path}.conv1.weight"]
        stride = 2 if weight.shape[0] > weight.shape[1] else 1
        y = norm(f"{path}.bn1", F.conv2d(x, weight, stride=stride, padding=1)).clamp_min(0)
        y = norm(f"{path}.bn2", F.conv2d(y, state[f"{path}.conv2.weight"], padding=1))
        if stride == 2:
            zeros = torch.zeros(len(x), (weight.shape[0] - weight.shape[1]) // 2, *y.shape[2:])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
        x = (y + x).clamp_min(0)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


def test_the_logits_are_those_of_the_published_arithmetic(model_folder):
    x = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = load(model_folder)(pixel_values=x).logits
    torch.testing.assert_close(found, by_hand(random_state(), x), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_every_block_is_a_hidden_state(model_folder):
    output = load(model_folder)(torch.zeros(1, 3, SIDE, SIDE), output_hidden_states=True)
    shapes = [tuple(hidden.shape[1:]) for hidden in output.hidden_states]
    assert shapes == [(4, 8, 8), (4, 8, 8), (8, 4, 4), (16, 2, 2)]
    labels = torch.tensor([1])
    loss = load(model_folder)(torch.zeros(1, 3, SIDE, SIDE), labels=labels).loss
    torch.testing.assert_close(loss, -output.logits.log_softmax(1)[0, 1])


@pytest.mark.parametrize("depth", [14, 20])
def test_a_pickled_checkpoint_of_any_depth(prepare, tmp_path, depth):
    """As the authors' own files are: a mapping with the weights, under names that data-parallel training gave them."""
    state = {f"module.{name}": value for name, value in random_state(depth).items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "model.th")
    folder = prepare.prepare(tmp_path / "model.th", tmp_path / "made", LABELS)
    assert json.loads((folder / "config.json").read_text())["depth"] == depth
    assert sum(type(module).__name__ == "Conv2d" for module in load(folder).modules()) == depth - 1


def test_the_folder_says_how_images_are_prepared(model_folder):
    processor = AutoImageProcessor.from_pretrained(model_folder)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8).permute(1, 2, 0).numpy()
    pixels = processor(white, return_tensors="pt")["pixel_values"]
    expected = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected), rtol=1e-4, atol=0)
    assert (model_folder / "LICENSE").is_file()


def without(name: str) -> dict[str, Tensor]:
    state = random_state()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("linear.bias"), "classifier.bias is missing"),
        (without("layer3.0.conv1.weight"), "depth must be 6 n"),
        ({**random_state(), "layer2.0.downsample.0.weight": torch.zeros(8, 4, 1, 1)}, "downsample.*too much"),
        ({"embedding.weight": torch.zeros(3)}, "conv1.weight"),
    ],
)
def test_other_checkpoints_are_refused(prepare, tmp_path, state, message):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(SystemExit, match=f"no ResNet for CIFAR.*{message}"):
        prepare.prepare(tmp_path / "model.pt", tmp_path / "made", LABELS)
    assert not (tmp_path / "made").exists()


def test_names_of_other_classes_are_refused(prepare, checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="has 2 classes, but 10 are named.*--labels"):
        prepare.prepare(checkpoint, tmp_path / "made")


def test_a_folder_with_other_files_is_left_alone(prepare, checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        prepare.prepare(checkpoint, tmp_path)
