"""Masked language models: real architectures, one by one and batched, and models that are none."""

import json

import pytest
import torch
from qpipe_data_augmentation import AugmentationOptions
from qpipe_data_augmentation.loading import load_masked_lm
from qpipe_data_augmentation.masked import Request
from qpipe_data_augmentation.sentences import Candidates
from qpipe_data_augmentation.words import Splitter, encode

import qpipe
from qpipe import ConfigError, ModelError
from qpipe.testing import tiny_model

CPU = torch.device("cpu")
SENTENCES = ["the movie was great fun", "a dull plot", "this story is not very moving and the actor was silly"]


def load(folder, **options):
    return load_masked_lm(str(folder), AugmentationOptions(**options), CPU)


def test_batched_candidates_are_those_of_one_forward_pass_each(masked_lm):
    """The second way: the whole output of the model for one unpadded sentence, sorted."""
    model = load(masked_lm)
    requests, expected = [], []
    for sentence in SENTENCES:
        words = sentence.split()
        encoded = encode(model.tokenizer, words, model.limit)
        assert encoded.ids == model.tokenizer(sentence, sentence)["input_ids"]
        for place in range(1, len(words) + 1):
            requests.append(Request(encoded, place))
            inputs = model.tokenizer(sentence, sentence, return_tensors="pt")
            inputs["input_ids"][0, place] = model.tokenizer.mask_token_id
            with torch.no_grad():
                order = model.model(**inputs).logits[0, place].argsort(descending=True)[:7]
            tokens = model.tokenizer.convert_ids_to_tokens(order.tolist())
            expected.append([token for token in tokens if token not in model.tokenizer.all_special_tokens])
    assert model.candidates(requests, 7) == expected
    assert len({tuple(words) for words in expected}) > 5, "the model does not predict the same everywhere"


def test_the_output_embedding_sees_masked_places_only(masked_lm):
    model = load(masked_lm, batch_size=4)
    seen = []
    model.model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    encoded = encode(model.tokenizer, SENTENCES[0].split(), model.limit)
    model.candidates([Request(encoded, place) for place in (1, 2, 3, 4, 5)], 3)
    assert [tuple(shape[:2]) for shape in seen] == [(4, 1), (1, 1)]


def test_places_beyond_the_longest_input_keep_their_word(masked_lm):
    model = load(masked_lm)
    assert model.limit == 66
    words = ["movie"] * 70
    found = Candidates(Splitter.like(model.tokenizer), lambda word, count: ["no"], model, 5).find([" ".join(words)])
    candidates = found[" ".join(words)].candidates
    assert candidates[69] == ["movie"] and len(candidates[3]) > 1 and "no" not in candidates[69]


def roberta(folder):
    """A tiny RoBERTa with byte-level tokens of which some begin words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgilmnoprstuvwy", "Ġ", "ov", "Ġm", "Ġmov", "ie"]
    tokens += ["Ġmovie", "Ġa", "Ġb"]
    merges = [("Ġ", "m"), ("o", "v"), ("Ġm", "ov"), ("i", "e"), ("Ġmov", "ie"), ("Ġ", "a"), ("Ġ", "b")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokens), max_position_embeddings=34, pad_token_id=1, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_byte_level_tokens_become_words(tmp_path):
    model = load(roberta(tmp_path))
    assert model.limit == 32, "positions begin after that of padding"
    found = Candidates(Splitter.like(model.tokenizer), lambda word, count: [f"not {word}"], model, 38)
    words = found.find(["movie bad Movie"])["movie bad Movie"]
    assert words.words == ["movie", "bad", "Movie"], "its words keep their case"
    assert sorted(words.candidates[0]) == ["a", "b", "m", "mov", "movie"], "tokens that begin words, without Ġ"
    assert words.candidates[1] == ["not bad"] and words.candidates[2] == ["not Movie"]


def albert(folder, scheme):
    """A tiny ALBERT with the tokens of SentencePiece, of which those with ▁ begin words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    pieces = ["▁movie", "▁a", "▁good", "▁b", "▁", "ad", "movie", *"abdegimnouv"]
    backend = Tokenizer(models.Unigram([(t, 0.0) for t in special] + [(p, -float(len(p) < 3)) for p in pieces], 1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **roles)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AlbertConfig(
        vocab_size=len(special) + len(pieces), embedding_size=8, max_position_embeddings=32, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AlbertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_tokens_of_sentencepiece_become_words(scheme, tmp_path):
    """Words in the middle of a sentence too, whether or not its tokenizer would put ▁ before the first alone."""
    model = load(albert(tmp_path, scheme))
    found = Candidates(Splitter.like(model.tokenizer), lambda word, count: [f"not {word}"], model, 23)
    words = found.find(["good bad movie"])["good bad movie"]
    assert words.words == ["good", "bad", "movie"]
    for place in (0, 2):
        assert sorted(words.candidates[place]) == ["a", "b", "good", "movie"], "tokens that begin words, without ▁"
    assert words.candidates[1] == ["not bad"], "two tokens"


def test_a_tokenizer_without_the_places_of_words_is_refused():
    with pytest.raises(ModelError, match=r"the tokenizer object is not a fast one, .* a tokenizer.json"):
        Splitter.like(object())


def test_a_model_that_a_run_trained_for_masked_words(tmp_path):
    """The README's way to a masked language model."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    source = {"model": {"name": str(tiny_model(tmp_path / "model"))}, "task": "masked-lm", "out": str(tmp_path / "run")}
    source |= {"data": {"train": str(text), "max_length": 16}, "train": {"max_steps": 1, "batch_size": 2}}
    qpipe.execute(qpipe.resolve({**source, "engine": {"name": "accelerate", "cpu": True}}))
    model = load(tmp_path / "run" / "model")
    encoded = encode(model.tokenizer, SENTENCES[0].split(), model.limit)
    assert len(model.candidates([Request(encoded, 2)], 5)[0]) > 0


def test_a_model_without_a_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no head for masked language modelling: .*cls.predictions.*Name a masked"):
        load(tiny_model(tmp_path))


def test_a_model_without_a_mask_token_is_refused(masked_lm, tmp_path):
    for file in masked_lm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"mask_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has no mask token, so it is of no masked language model. Name a masked"):
        load(tmp_path)


def test_a_decoder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is a llama model, which cannot predict masked words"):
        load(tiny_model(tmp_path, "llama"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, masked_lm):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=7, **sizes)).save_pretrained(tmp_path)
    for file in masked_lm.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"has 31 tokens, more than the model's 7: it belongs to another model"):
        load(tmp_path)


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from 'no/such-model'"):
        load("no/such-model")
