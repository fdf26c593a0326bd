"""The reference's toy vocabulary, vectors and masked language model, and tiny real ones."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qpipe_data_augmentation.masked import MaskedLM
from qpipe_data_augmentation.sentences import Candidates
from qpipe_data_augmentation.vectors import read_vectors
from qpipe_data_augmentation.words import Splitter

from qpipe.testing import tiny_model
from qpipe.testing.tiny import VOCABULARY

GOLDEN = json.loads((Path(__file__).parent / "golden" / "data_aug.json").read_text())


class Scripted(torch.nn.Module):
    """The rule of the golden file: `logits[pos, v] = (7 pos + 13 sum(ids) + 31 v) mod 101`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.batches = size, []

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.batches.append(input_ids)
        batch, length = input_ids.shape
        total = (input_ids * attention_mask).sum(dim=1).view(batch, 1, 1)
        places, tokens = torch.arange(length).view(1, length, 1), torch.arange(self.size).view(1, 1, -1)
        return SimpleNamespace(logits=((7 * places + 13 * total + 31 * tokens) % 101).float())


def bert_tokenizer(folder: Path, vocabulary) -> Path:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """`reference(M, batch_size=64)`: the candidates of the golden file, special tokens among them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("reference")
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer(folder / "model", GOLDEN["vocab"]))
    lines = zip(GOLDEN["glove_words"], GOLDEN["glove_vectors"], strict=True)
    (folder / "glove.txt").write_text("".join(f"{word} {' '.join(row)}\n" for word, row in lines))

    def make(count: int, batch_size: int = 64) -> Candidates:
        scripted = Scripted(len(GOLDEN["vocab"]))
        model = MaskedLM(scripted, tokenizer, 512, torch.device("cpu"), batch_size, special=True)
        vectors = read_vectors(str(folder / "glove.txt"), 100_000)
        return Candidates(Splitter.like(tokenizer), vectors, model, count)

    return make


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory):
    """A folder with a tiny BERT that has a head for masked words, and the tokenizer of `tiny_model`."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tiny_model(tmp_path_factory.mktemp("masked") / "lm")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=66, pad_token_id=0, **sizes)
        BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def vectors_file(tmp_path):
    """A vectors file with the words of the tiny data."""
    path = tmp_path / "vectors.txt"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(VOCABULARY), 4, generator=generator).tolist()
    path.write_text("".join(f"{w} {' '.join(map(str, row))}\n" for w, row in zip(VOCABULARY, rows, strict=True)))
    return path
