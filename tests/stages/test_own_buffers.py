"""Buffers that a model makes in a type of their own keep it, as `from_pretrained` leaves it to them."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizer

import qpipe
from qpipe.export.verify import verify_all
from qpipe.stages.casting import own_buffers, own_types
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config
from qpipe.testing.tiny import VOCABULARY

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BagConfig(PretrainedConfig):
    model_type = "bag"

    def __init__(self, vocab_size=40, width=32, **others):
        self.vocab_size, self.width = vocab_size, width
        super().__init__(**others)


class BagModel(PreTrainedModel):
    config_class = BagConfig
    base_model_prefix = "bag"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.inner = nn.Linear(config.width, config.width)
        self.norm = nn.BatchNorm1d(config.width)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.register_buffer("wide", torch.arange(1, 4, dtype=torch.float64) / 3)
        self.register_buffer("rates", 1.0 / 10000 ** (torch.arange(config.width).float() / config.width))
        self.register_buffer("count", torch.tensor(7))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **others):
        x = self.inner(self.words(input_ids)) * self.rates.to(self.words.weight.dtype)
        x = x.sum(1) * self.wide.sum().to(x.dtype)
        return SequenceClassifierOutput(logits=self.classifier(self.norm(x)))
"""


@pytest.fixture
def run(tmp_path):
    """A finished run of a model with code of its own."""
    folder = tmp_path / "bag"
    folder.mkdir()
    (folder / "modeling_bag.py").write_text(CODE)
    scope: dict = {"__name__": "modeling_bag"}
    exec(CODE, scope)
    model = scope["BagModel"](scope["BagConfig"](vocab_size=len(VOCABULARY)))
    names = {"AutoConfig": "BagConfig", "AutoModelForSequenceClassification": "BagModel"}
    model.config.auto_map = {auto: f"modeling_bag.{name}" for auto, name in names.items()}
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    rules = [{"site": "*:weight", "quantizer": "uniform", "options": {"bits": 4}}]
    changes = {"model__name": str(folder), "model__trust_remote_code": True, "train__max_steps": 2}
    return qpipe.execute(tiny_config(tmp_path, quantization__preset=None, quantization__rules=rules, **changes))


def test_they_are_exported_as_they_are(run):
    """A buffer of float64 was cut to float32, and the export did not verify."""
    assert run.results["verified"]
    assert run.student.wide.dtype == torch.float64 and run.student.norm.running_mean.dtype == torch.float32
    again = restore(run.out).student
    assert torch.equal(again.wide, torch.arange(1, 4, dtype=torch.float64) / 3)
    (verified,) = verify_all([run.out / "export"], trust_remote_code=True)
    assert verified.passed, "\n".join(verified.lines())


def test_those_of_a_model_in_bfloat16(run):
    """They have the types that `from_pretrained` gives them; others, such as running means, are cast."""
    bf16 = torch.bfloat16
    assert own_types(run.student, bf16) == {"wide": torch.float64, "rates": torch.float32}
    stock = AutoModelForSequenceClassification.from_pretrained(run.out / "model", trust_remote_code=True, dtype=bf16)
    student, rates = restore(run.out).student, run.student.rates.clone()
    with own_buffers(student, bf16):
        student.to(bf16)
    for name in ("wide", "rates", "count", "norm.running_mean", "words.weight"):
        assert student.state_dict()[name].dtype == stock.state_dict()[name].dtype, name
    assert torch.equal(student.rates, rates)
