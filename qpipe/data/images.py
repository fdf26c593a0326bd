"""Decoding, scaling and collation of images."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, ViTImageProcessorPil

from qpipe.config import ModelConfig
from qpipe.data.locate import locate
from qpipe.data.sources import Split
from qpipe.data.text import Collate
from qpipe.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF")
"""First bytes of PNG, JPEG, GIF and WebP files, which could by chance be as long as a raw image."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet (values scaled to 0..1), as torchvision and timm use them."""


def load_processor(model: ModelConfig) -> Any:
    """The image processor beside the model, or one made from its configuration.

    Without a `preprocessor_config.json`, images are resized to the model configuration's `image_size` (kept as they
    are if it has none), scaled to 0..1 and normalised with `image_mean` and `image_std` from the model configuration or
    `model.config`; default: the statistics of ImageNet.
    """
    name = model.tokenizer or model.name
    options = _options(model, name)
    path = Path(locate(name))
    has_own = any((path / file).is_file() for file in PROCESSOR_FILES)
    if has_own or not path.is_dir():
        try:
            return AutoImageProcessor.from_pretrained(locate(name), **options)
        except (OSError, ValueError) as error:
            if has_own or model.tokenizer is not None:
                raise ConfigError(f"no image processor can be loaded from {name!r}: {error}") from error
    settings = {**_model_settings(model), **model.config}
    size = settings.get("image_size")
    height, width = (size, size) if isinstance(size, int) else (size or (224, 224))
    return ViTImageProcessorPil(
        do_resize=size is not None,
        size={"height": int(height), "width": int(width)},
        image_mean=list(settings.get("image_mean") or MEAN),
        image_std=list(settings.get("image_std") or STD),
    )


def _options(model: ModelConfig, name: str) -> dict[str, Any]:
    revision = model.revision if name == model.name else None  # of another repository it says nothing
    return {"revision": revision, "trust_remote_code": model.trust_remote_code}


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    try:
        config = AutoConfig.from_pretrained(locate(model.name), **_options(model, model.name))
    except (OSError, ValueError):  # models of other libraries have no transformers configuration
        logger.warning(
            "%r has no configuration that says how to prepare images; unless model.config sets image_size, image_mean "
            "and image_std, they keep their size and are normalised with the statistics of ImageNet",
            model.name,
        )
        return {}
    settings: dict[str, Any] = config.to_dict()
    return settings


def decode(value: Any) -> Image.Image:
    """An RGB image from a PIL image, an encoded file, `{"bytes": ...}`, or square uint8 channels-first bytes (3, n, n).

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, dict) and value.get("bytes") is not None:
        value = value["bytes"]
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if not isinstance(value, bytes):
        raise DataError(f"an image is a {type(value).__name__}; allowed: PIL images, encoded files, raw uint8 bytes")
    side = math.isqrt(len(value) // 3)
    if side > 0 and 3 * side * side == len(value) and not value.startswith(SIGNATURES):
        return Image.fromarray(np.frombuffer(value, dtype=np.uint8).reshape(3, side, side).transpose(1, 2, 0))
    try:
        return Image.open(io.BytesIO(value)).convert("RGB")
    except OSError as error:
        raise DataError(
            f"an image of {len(value)} bytes is neither an encoded file nor 3 x n x n raw uint8 values ({error})"
        ) from error


def image_rows(split: Split, column: str, labels: np.ndarray[Any, Any]) -> datasets.Dataset:
    """Columns `image` (still encoded) and `labels`; pixels are made batch by batch.

    Raises:
        DataError: the first image cannot be decoded.
    """
    data = split.data.select_columns([column])
    data = data.rename_column(column, "image") if column != "image" else data
    try:
        decode(data[0]["image"])
    except DataError as error:
        raise DataError(f"{split.source}, row {int(split.rows[0])} (from 0), column {column!r}: {error}") from error
    return data.add_column("labels", labels)


def image_collate(processor: Any) -> Collate:
    """Makes `pixel_values` `[batch, 3, height, width]` float32 and `labels` `[batch]` int64."""

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor([decode(feature["image"]) for feature in features], return_tensors="pt")["pixel_values"]
        labels = torch.tensor([feature["labels"] for feature in features], dtype=torch.int64)
        return {"pixel_values": pixels, "labels": labels}

    return collate
