"""Models of texts: padding that decoders must know, positions that are learned, and whose revision is meant."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qpipe
from qpipe import ConfigError
from qpipe.config import ModelConfig
from qpipe.data import text
from qpipe.stages.texts import positions, tokens_in_texts, vocabulary
from qpipe.testing import tiny_config, tiny_model


def without_padding(folder):
    """A decoder that classifies, as most are published: with a tokenizer that pads, and without a padding token."""
    tiny_model(folder, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    return folder


def test_a_decoder_classifies_at_the_last_token_that_is_no_padding(tmp_path, fast):
    """Training, evaluation and export do not depend on what else is in the batch."""
    folder = without_padding(tmp_path / "decoder")
    config = tiny_config(tmp_path, model__name=str(folder), export__format="native", train__max_steps=2)
    run = qpipe.execute(config)
    assert run.student.config.pad_token_id == run.data.tokenizer.pad_token_id == 0
    rows = sorted((run.data.validation[i] for i in range(16)), key=lambda row: len(row["input_ids"]))
    short, long = rows[0], rows[-1]
    assert len(short["input_ids"]) < len(long["input_ids"])
    with torch.no_grad():
        alone, both = (
            run.student.eval()(**{k: v for k, v in run.data.collate(batch).items() if k != "labels"}).logits
            for batch in ([short], [short, long])
        )
    torch.testing.assert_close(both[:1], alone)
    exported = AutoModelForSequenceClassification.from_pretrained(run.out / "model")
    assert exported.config.pad_token_id == 0


def test_an_encoder_keeps_what_its_configuration_says(tmp_path, assembled):
    config = tiny_config(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(config.model.name)
    model.config.pad_token_id = 3
    model.save_pretrained(config.model.name)
    assert assembled(config).student.config.pad_token_id == 3


@pytest.mark.parametrize(("family", "most"), [("bert", 66), ("roberta", 65), ("distilbert", 66), ("llama", None)])
def test_learned_positions(family, most, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model(tmp_path / family, family))
    assert positions(model) == most


def test_texts_longer_than_the_positions_are_refused_before_anything_long(tmp_path, assembled):
    config = tiny_config(tmp_path, data__max_length=67)
    with pytest.raises(ConfigError, match="data.max_length is 67, but Bert.* has learned 66 positions; lower it to 66"):
        assembled(config)
    assembled(tiny_config(tmp_path, data__max_length=66))


def test_a_tokenizer_that_knows_more_words_than_the_model_is_refused(tmp_path, assembled):
    config = tiny_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    tokenizer.add_tokens([f"further{number}" for number in range(200)])
    tokenizer.save_pretrained(tmp_path / "words")
    other = config.model.model_copy(update={"tokenizer": str(tmp_path / "words")})
    with pytest.raises(
        ConfigError, match=r"the tokenizer has \d+ tokens and Bert.* embeddings of \d+; set model.token"
    ):
        assembled(config.model_copy(update={"model": other}))


def test_special_tokens_for_other_uses_need_no_embedding(tmp_path, assembled):
    """As Gemma's tokenizer has one for images, which is in no text."""
    config = tiny_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    tokenizer.add_tokens(["[IMAGE]"], special_tokens=True)
    tokenizer.save_pretrained(config.model.name)
    run = assembled(config)
    assert len(run.data.tokenizer) == vocabulary(run.student) + 1 == tokens_in_texts(run.data.tokenizer) + 1


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_folder_without_a_tokenizer_is_refused(family, tmp_path):
    """transformers makes up a tokenizer that knows no word."""
    folder = tiny_model(tmp_path / "model", family)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(ConfigError, match=r"model' has no tokenizer; save the one .* or set model.tokenizer"):
        text.load_tokenizer(ModelConfig(name=str(folder)), 16)


@pytest.mark.parametrize("name", ["/no/such/model", "./bert", "~/bert", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_name_on_the_hub(name):
    with pytest.raises(ConfigError, match=f"model.name '{name}' does not exist; local paths are relative to"):
        text.load_tokenizer(ModelConfig(name=name), 16)
    with pytest.raises(ConfigError, match=f"model.tokenizer '{name}' does not exist"):
        text.load_tokenizer(ModelConfig(name="org/tiny", tokenizer=name), 16)


def test_a_revision_is_that_of_the_model(tmp_path, monkeypatch):
    asked = []

    def load(name, revision=None, **options):
        asked.append((name, revision))
        raise OSError("not here")

    monkeypatch.setattr(text.AutoTokenizer, "from_pretrained", load)
    for tokenizer, revision in (("other/words", None), (None, "abc"), ("org/tiny", "abc")):
        with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
            text.load_tokenizer(ModelConfig(name="org/tiny", revision="abc", tokenizer=tokenizer), 16)
        assert asked[-1] == (tokenizer or "org/tiny", revision)


def test_a_finished_run_reads_the_tokenizer_that_it_kept(tmp_path, fast):
    words = tiny_model(tmp_path / "words")
    run = qpipe.execute(tiny_config(tmp_path, model__tokenizer=str(words), train__max_steps=1))
    for path in words.iterdir():
        path.unlink()
    assert qpipe.stages.evaluate_run(run.out) == run.results["evaluation"]
