"""Configuration of the residual networks for 32 x 32 images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CifarResNetConfig(PretrainedConfig):
    """Shape of a network, and how images are prepared for it.

    Attributes:
        depth: number of layers with weights, 6 n + 2: a convolution, three stages of n blocks, a linear map.
        width: channels of the first stage; the two others have twice and four times as many.
        image_size: pixels of a side, 32 as published; any multiple of 4.
        image_mean: mean of each channel, for values from 0 to 1.
        image_std: standard deviation of each channel.
    """

    model_type = "cifar-resnet"

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        image_size: int = 32,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2 with n of at least 1 (8, 14, 20, 32, 56, ...), not {depth}")
        self.depth = depth
        self.width = width
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)
