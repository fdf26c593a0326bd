"""Loading models with keys of `model.config`."""

import shutil

import pytest
import torch
from transformers import AutoConfig

from qpipe import ModelError, Task
from qpipe.builtin.models import Models
from qpipe.config import ModelConfig
from qpipe.testing.tiny import tiny_model

CLASSES = Task(name="classes", kind="classification", metrics=())
WORDS = Task(name="words", kind="masked-lm", metrics=())
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


@pytest.fixture
def configuration(tmp_path):
    """A folder with configuration and tokenizer, without weights."""
    folder = tiny_model(tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def drawn(spec, task=WORDS, seed=0):
    torch.manual_seed(seed)
    return Models().qpipe_load_model(spec, task, 0 if task is WORDS else 3, strict=False)


def test_random_weights_follow_from_the_seed_and_need_no_checkpoint(configuration):
    spec = ModelConfig(name=str(configuration), weights="random", config={"num_hidden_layers": 3})
    first, again, other = drawn(spec), drawn(spec), drawn(spec, seed=1)
    assert len(first.bert.encoder.layer) == 3
    assert first.cls.predictions.decoder.weight is first.bert.embeddings.word_embeddings.weight
    values = [dict(model.named_parameters()) for model in (first, again, other)]
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())
    matrices = [name for name, value in values[0].items() if value.dim() == 2]
    assert matrices and not any(torch.equal(values[0][name], values[2][name]) for name in matrices)
    assert {value.dtype for value in values[0].values()} == {torch.float32}


def test_random_weights_leave_those_of_the_checkpoint(tmp_path):
    folder = tiny_model(tmp_path / "model")
    spec = ModelConfig(name=str(folder), weights="random")
    model = drawn(spec, CLASSES, seed=5)
    pretrained = drawn(spec.model_copy(update={"weights": "pretrained"}), CLASSES)
    assert model.num_labels == 3
    assert float(model.bert.pooler.dense.weight.detach().std()) == pytest.approx(
        model.config.initializer_range, rel=0.2
    )
    assert not torch.equal(model.bert.pooler.dense.weight, pretrained.bert.pooler.dense.weight)


def test_a_random_model_has_to_be_one_and_to_be_trained(configuration, tmp_path):
    """Unknown keys, a folder without a configuration, and what has to be a trained model are refused."""
    spec = ModelConfig(name=str(configuration), weights="random")
    with pytest.raises(ModelError, match="has no 'num_hiden_layers', which model.config gives"):
        drawn(spec.model_copy(update={"config": {"num_hiden_layers": 1}}))
    shutil.copytree(configuration, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ModelError, match="does not load for task kind 'masked-lm'"):
        drawn(spec.model_copy(update={"name": str(tmp_path / "bare")}))
    with pytest.raises(ModelError, match="lacks weights.*it was not fine-tuned for this task"):
        Models().qpipe_load_model(spec, CLASSES, 3, strict=True)
