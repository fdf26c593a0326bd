"""A family that transformers cannot load with packed weights is known before it is trained."""

import pytest
import transformers as hf

import qpipe
from qpipe import FormatError
from qpipe.stages import plan_run
from qpipe.testing import tiny_config
from qpipe.testing.tiny import VOCABULARY, tiny_images

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def modernbert(folder):
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = hf.ModernBertConfig(vocab_size=len(VOCABULARY), intermediate_size=64, **SIZES, **ids)
    hf.ModernBertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_a_family_that_reads_every_weight_while_it_loads(tmp_path, capfd):
    """ModernBERT's initialisation does. The native format has a loading of its own."""
    changes = {"model__name": modernbert(tmp_path / "modern"), "quantization__preset": "w4", "train__max_steps": 1}
    with pytest.raises(
        FormatError,
        match=r"compressed-tensors.*ModernBertForSequenceClassification cannot be loaded by transformers with packed "
        r"weights.*no attribute 'weight'; use export.format: native",
    ):
        plan_run(tiny_config(tmp_path, **changes))
    assert "Loading" not in capfd.readouterr().err
    run = qpipe.execute(tiny_config(tmp_path, export__format="native", **changes))
    assert run.results["verified"]


def test_a_family_whose_weights_transformers_converts(tmp_path):
    """DINOv2's, by a rule that meets that of packed weights."""
    images = str(tiny_images(tmp_path / "images.parquet"))
    config = hf.Dinov2Config(image_size=16, patch_size=8, **SIZES)
    hf.Dinov2ForImageClassification(config).save_pretrained(tmp_path / "dino")
    rules = [{"site": "{block}.*:weight", "quantizer": "uniform", "options": {"bits": 4}}]
    changes = {"task": "image-classification", "data__train": images, "data__pad_to_max_length": False}
    changes |= {"model__name": str(tmp_path / "dino"), "quantization__preset": None, "quantization__rules": rules}
    with pytest.raises(FormatError, match=r"Dinov2.* cannot be loaded by transformers with packed weights"):
        plan_run(tiny_config(tmp_path, data__max_length=128, **changes))


def test_embeddings_are_not_packed(tmp_path):
    """So that a plan of these alone can be loaded by any family."""
    name = modernbert(tmp_path / "modern")
    rules = [{"site": "{embedding}:weight", "quantizer": "uniform"}]
    changes = {"model__name": name, "quantization__preset": None, "quantization__rules": rules}
    assert qpipe.execute(tiny_config(tmp_path, train__max_steps=1, **changes)).results["verified"]
