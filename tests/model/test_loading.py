"""Loading models with keys of `model.config`."""

import pytest
from transformers import AutoConfig

from qpipe import ModelError, Task
from qpipe.builtin.models import Models
from qpipe.config import ModelConfig
from qpipe.testing.tiny import tiny_model

IMAGES = Task(name="images", kind="image-classification", metrics=())


def test_image_statistics_are_for_the_processor(tmp_path):
    """transformers' ViT takes no such arguments; the saved model says them, so that its processor can be made of it."""
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    spec = ModelConfig(name=str(tiny_model(tmp_path / "vit", "vit")), config={**statistics, "image_size": 16})
    model = Models().qpipe_load_model(spec, IMAGES, 2, strict=False)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(saved, name) for name in statistics} == statistics


def test_unknown_key_is_refused(tmp_path):
    spec = ModelConfig(name=str(tiny_model(tmp_path / "vit", "vit")), config={"num_hiden_layers": 1})
    with pytest.raises(ModelError, match="num_hiden_layers"):
        Models().qpipe_load_model(spec, IMAGES, 2, strict=False)
