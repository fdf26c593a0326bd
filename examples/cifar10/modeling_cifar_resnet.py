"""Residual networks for 32 x 32 images, with shortcuts that have no weights.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2 with option A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_cifar_resnet import CifarResNetConfig


class CifarResNetBlock(nn.Module):
    """Two convolutions beside a shortcut. `[batch, inputs, h, w]` to `[batch, outputs, h / stride, w / stride]`."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both ways, without its negative part."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every second pixel, between channels of zeros."""
        if self.stride == 1 and not self.added:
            return x
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


def stage(inputs: int, outputs: int, count: int) -> nn.ModuleList:
    """`count` blocks; the first one halves the image where the number of channels changes."""
    first = CifarResNetBlock(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.ModuleList([first, *(CifarResNetBlock(outputs, outputs, 1) for _ in range(count - 1))])


class CifarResNetPreTrainedModel(PreTrainedModel):
    """What the network has in common with other models of transformers."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    _no_split_modules = ["CifarResNetBlock"]
    # Tells which modules are the blocks, as in transformers' own models.
    _can_record_outputs = {"hidden_states": CifarResNetBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming's initialization of every weight (He et al., 2015), and identity for batch normalization."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


class CifarResNetModel(CifarResNetPreTrainedModel):
    """From images to features: `[batch, 3, h, w]` to `[batch, 4 width, h / 4, w / 4]`."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        first = config.width
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        count = (config.depth - 2) // 6
        self.layer1 = stage(first, first, count)
        self.layer2 = stage(first, 2 * first, count)
        self.layer3 = stage(2 * first, 4 * first, count)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The first convolution's output and that of every block."""
        hidden = [F.relu(self.bn1(self.conv1(pixel_values)))]
        for block in (*self.layer1, *self.layer2, *self.layer3):
            hidden.append(block(hidden[-1]))
        return tuple(hidden)


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """A linear map from the mean over all pixels of the features to classes."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.resnet = CifarResNetModel(config)
        self.classifier = nn.Linear(4 * config.width, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits `[batch, labels]`.

        Args:
            pixel_values: normalised images, `[batch, 3, h, w]`.
            labels: class ids, `[batch]`, for the cross-entropy in `loss`; or None.
            output_hidden_states: True for the outputs of the first convolution and of every block.
            kwargs: what transformers' own models take and a convolution net has no use for.
        """
        hidden = self.resnet(pixel_values)
        logits = self.classifier(hidden[-1].mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden if output_hidden_states else None)
