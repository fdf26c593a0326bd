"""A student with some of the model's layers computes what those layers alone compute."""

import re

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as Classifier

from qpipe import ConfigError, ModelError
from qpipe.builtin.models import Models
from qpipe.model.reduce import chosen_layers, keep_layers
from qpipe.testing import tiny_model

CLASSES = {"vit": AutoModelForImageClassification, "llama": AutoModelForCausalLM, "qwen3": AutoModelForCausalLM}
FAMILIES = ("bert", "roberta", "ernie", "distilbert", "vit", "llama", "qwen3")


def blocks(model):
    return Models().qpipe_model_map(model=model).blocks


def output(model, family):
    torch.manual_seed(1)
    inputs = torch.rand(2, 3, 16, 16) if family == "vit" else torch.randint(5, 20, (2, 7))
    with torch.no_grad():
        return model.eval()(inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_a_small_model_with_the_weights_of_these_layers(family, tmp_path):
    folder, kept = tiny_model(tmp_path / "model", family, num_hidden_layers=4), (3, 1)
    loader = CLASSES.get(family, Classifier)
    whole, reduced = loader.from_pretrained(folder), loader.from_pretrained(folder)
    keep_layers(reduced, blocks(reduced), kept)
    small = AutoConfig.from_pretrained(folder)
    small.num_hidden_layers = 2
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    expected = loader.from_config(small)
    state = {}
    for name, value in whole.state_dict().items():
        layer = re.search(r"(layers?\.)(\d+)\.", name)
        if layer and int(layer[2]) not in kept:
            continue
        state[name if not layer else name.replace(layer[0], f"{layer[1]}{kept.index(int(layer[2]))}.", 1)] = value
    expected.load_state_dict(state, strict=True)
    assert torch.equal(output(reduced, family), output(expected, family))
    assert not torch.equal(output(reduced, family), output(whole, family))
    reduced.save_pretrained(tmp_path / "saved")
    again = loader.from_pretrained(tmp_path / "saved")
    assert again.config.num_hidden_layers == 2 and torch.equal(output(again, family), output(reduced, family))


def test_every_other():
    assert chosen_layers("every-other", 12) == [1, 3, 5, 7, 9, 11]
    assert chosen_layers("every-other", 5) == [1, 3]
    assert chosen_layers((0, 2), 3) == [0, 2]


@pytest.mark.parametrize(("wanted", "depth"), [((), 4), ((1, 1), 4), ((4,), 4), ("every-other", 1)])
def test_layers_that_are_not_there(wanted, depth):
    with pytest.raises(ConfigError, match=f"must name at least one of the blocks 0 to {depth - 1}"):
        chosen_layers(wanted, depth)


def test_a_model_without_a_list_of_blocks(tmp_path):
    model = AutoModelForImageClassification.from_pretrained(tiny_model(tmp_path / "resnet", "resnet"))
    with pytest.raises(ModelError, match="the blocks of ResNetForImageClassification are not known as one list"):
        keep_layers(model, (), "every-other")


SIZES = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLACED = {
    # Its first block has no normalisation before the attention; every other one has.
    "modernbert": lambda: hf.ModernBertConfig(**SIZES, **TOKENS, cls_token_id=3, sep_token_id=4),
    # One layer in three has no rotary positions, by number.
    "smollm3": lambda: hf.SmolLM3Config(**SIZES, **TOKENS, num_key_value_heads=2, no_rope_layer_interval=3),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=6, n_head=4, scale_attn_by_inverse_layer_idx=True, **TOKENS
    ),
}


@pytest.mark.parametrize("family", PLACED)
def test_blocks_that_depend_on_their_place_are_refused(family):
    """Loaded again, the model would be another than the one that was trained."""
    config = PLACED[family]()
    loader = Classifier if family == "modernbert" else AutoModelForCausalLM
    model = loader.from_config(config)
    with pytest.raises(ModelError, match=r"model.keep_layers: .* depends on its place: .* when the saved model is"):
        keep_layers(model, blocks(model), [2, 4, 5])


def test_rates_of_dropout_by_layer_are_no_reason_to_refuse():
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = hf.BeitConfig(**sizes, image_size=16, patch_size=4, drop_path_rate=0.1)
    model = AutoModelForImageClassification.from_config(config)
    keep_layers(model, blocks(model), [1, 3, 5])
    assert model.config.num_hidden_layers == 3


def test_a_depth_that_is_kept_elsewhere_is_refused():
    """Decoders of BART's kind have `decoder_layers`; their `num_hidden_layers` is that of an encoder."""
    sizes = {"d_model": 32, "vocab_size": 40, "max_position_embeddings": 40}
    parts = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 4), ("attention_heads", 4), ("ffn_dim", 64))
    }
    model = AutoModelForCausalLM.from_config(hf.BartConfig(**sizes, **parts))
    with pytest.raises(ModelError, match="BartForCausalLM with 2 blocks would have 4 when the saved model is loaded"):
        keep_layers(model, blocks(model), [1, 3])
