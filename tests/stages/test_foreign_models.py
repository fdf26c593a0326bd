"""Models that are not quite what a run takes them for are refused, or named, before anything is lost."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from transformers import BertTokenizer

import qpipe
from qpipe import (
    ConfigError,
    FormatError,
    Loss,
    ModelError,
    Options,
    Plugin,
    Quantizer,
    QuantizerKind,
    Signals,
    WeightLoss,
    hookimpl,
)
from qpipe.host import load_plugins
from qpipe.stages import checkpoint
from qpipe.stages.build import instrument
from qpipe.stages.calibrate import inputs_of
from qpipe.stages.recomputing import recompute
from qpipe.stages.sizes import fixed_size
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.tiny import VOCABULARY, tiny_lines

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def warnings(monkeypatch, caplog):
    """`warnings()`: what the log warned of."""
    monkeypatch.setattr(logging.getLogger("qpipe"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("changed", [{"intermediate_size": 48}, {"max_position_embeddings": 40}])
def test_weights_of_another_shape_are_refused(changed, tmp_path, assembled):
    """They would begin at random, and nobody would know."""
    config = tiny_config(tmp_path, model__config=changed)
    with pytest.raises(ModelError, match=r"bert\..* has shape \(.*\) in the checkpoint and \(.*\) in the model"):
        assembled(config)


def test_a_head_for_other_labels_is_made_anew(tmp_path, assembled):
    config = tiny_config(tmp_path)
    tiny_model(tmp_path / "model", num_labels=5)
    assert assembled(config).student.config.num_labels == 2


def test_two_labels_without_names_where_the_family_has_three(tmp_path):
    """transformers writes no labels of BART then, and would read three of them."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = tiny_config(
        tmp_path,
        task="classification",
        data__train=str(tmp_path / "numbers.csv"),
        quantization__preset=None,
        quantization__rules=[{"site": "*fc1:weight", "quantizer": "uniform"}],
        train__max_steps=1,
    )
    (tmp_path / "numbers.csv").write_text("text,label\n" + "the movie was good,1\nthe movie was bad,0\n" * 40)
    model = hf.BartForSequenceClassification(hf.BartConfig(vocab_size=len(VOCABULARY), **sizes, **heads, **ids))
    model.save_pretrained(tmp_path / "model")
    run = qpipe.execute(config)
    assert run.results["verified"]
    for folder in (run.out / "model", run.out / "export"):
        assert hf.AutoConfig.from_pretrained(folder).num_labels == 2
    assert restore(run.out).student.config.num_labels == 2


def test_a_configuration_that_holds_infinity(tmp_path, fast):
    """As Mamba2's does, which transformers alone reads back."""
    config = tiny_config(
        tmp_path,
        task="causal-lm",
        data__train=str(tiny_lines(tmp_path / "lines.jsonl")),
        quantization__preset=None,
        quantization__rules=[{"site": "*in_proj:weight", "quantizer": "uniform"}],
        train__max_steps=1,
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    hf.Mamba2ForCausalLM(hf.Mamba2Config(vocab_size=len(VOCABULARY), **sizes, **ids)).save_pretrained(
        tmp_path / "model"
    )
    assert "Infinity" in (tmp_path / "model" / "config.json").read_text()
    assert (qpipe.execute(config).out / "export" / "config.json").is_file()


def test_layers_that_the_checkpoint_has_not_are_named(tmp_path, assembled, warnings):
    assembled(tiny_config(tmp_path, model__config={"num_hidden_layers": 3}))
    assert any("has no weights for 16 parameters of the model itself, such as bert.encoder.layer.2." in text
               for text in warnings())  # fmt: skip


def mixtral(folder):
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 66}
    model = hf.MixtralForSequenceClassification(
        hf.MixtralConfig(vocab_size=len(VOCABULARY), pad_token_id=0, **SIZES, **experts)
    )
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_weights_that_no_rule_can_name_are_told(tmp_path, assembled, warnings):
    """Experts are parameters without a module of their own."""
    config = tiny_config(tmp_path, model__name=str(mixtral(tmp_path / "experts")), quantization__preset="w4")
    run = assembled(config)
    inside = {n: p for n, p in run.student.named_parameters() if ".layers." in n and p.ndim > 1}
    left = sum(p.numel() for n, p in inside.items() if "self_attn" not in n)
    share = 100 * left / sum(p.numel() for p in inside.values())
    (told,) = [text for text in warnings() if "stay in full precision" in text]
    assert told.startswith(f"{share:.0f} % of the weights of the quantized blocks") and "mlp" in told


def test_a_model_all_of_whose_weights_are_sites_warns_of_nothing(tmp_path, assembled, warnings):
    assembled(tiny_config(tmp_path, quantization__preset="w4"))
    assert not [text for text in warnings() if "full precision" in text]


class Entropy(Plugin):
    """Learns from the student's own attention; there is no teacher."""

    def __init__(self, kind="probs"):
        super().__init__()
        self.kind, self.seen = kind, []

    @hookimpl
    def qpipe_signals(self):
        return Signals(student=frozenset({self.kind}))

    @hookimpl
    def qpipe_losses(self):
        def entropy(step):
            self.seen.append(set(step.student))
            return -(step.student[self.kind, 0].clamp_min(1e-9).log()).mean()

        return [Loss("entropy", entropy)]


def test_signals_of_the_student_need_no_teacher(tmp_path, use, fast):
    entropy = Entropy()
    use(entropy)
    qpipe.execute(tiny_config(tmp_path, train__max_steps=1))
    assert entropy.seen == [{("probs", 0), ("probs", 1)}]


def test_outputs_of_attention_whose_projection_is_not_known_are_refused():
    model = hf.GPT2ForSequenceClassification(hf.GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4))
    found = instrument(load_plugins({}), model)
    assert found.map.attention and not found.map.attention_output
    with pytest.raises(ModelError, match="offers no attention_output: its attention is not known"):
        found.want(frozenset({"attention_output"}), {})
    found.enable_capture()
    found.want(frozenset({"scores"}), {})


def test_layers_that_share_one_block_cannot_be_told_apart():
    config = hf.AlbertConfig(vocab_size=30, embedding_size=16, **SIZES)
    found = instrument(load_plugins({}), hf.AlbertForSequenceClassification(config))
    with pytest.raises(ModelError, match=r"runs 2 layers in 1 block\(s\), whose hidden_states, scores cannot be told"):
        found.want(frozenset({"hidden_states", "scores", "logits"}), {})
    found.want(frozenset({"logits"}), {})


def test_a_penalty_counts_a_tied_weight_once(tmp_path, assembled):
    class Penalty(Plugin):
        @hookimpl
        def qpipe_weight_losses(self):
            return [WeightLoss("squares", lambda w: w.square().sum(), 1.0, lambda path: True)]

    tiny_model(tmp_path / "decoder", "llama", tie_word_embeddings=True)
    text = tmp_path / "text.txt"
    text.write_text("the movie was great fun\n" * 40)
    config = tiny_config(
        tmp_path, model__name=str(tmp_path / "decoder"), task="causal-lm", data__train=str(text),
        data__validation=None, data__validation_fraction=0.2, data__text_columns=None, data__label_column=None,
        data__max_length=8,
    )  # fmt: skip
    run = assembled(config, Penalty())
    assert run.student.lm_head.weight is run.student.model.embed_tokens.weight
    modules = run.student.named_modules()
    holders = [name for name, module in modules if getattr(getattr(module, "qpipe", None), "weight_losses", ())]
    assert len([name for name in holders if "embed_tokens" in name or "lm_head" in name]) == 1


def test_models_that_cannot_checkpoint_activations_are_told_so(tmp_path, assembled):
    run = assembled(tiny_config(tmp_path))
    run.student = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    run.config = run.config.model_copy(
        update={"train": run.config.train.model_copy(update={"activation_checkpointing": True})}
    )
    with pytest.raises(ConfigError, match=r"ResNet.* cannot checkpoint activations; leave train.activation_ch"):
        recompute(run)


def test_a_tied_bias_is_counted_where_the_file_has_it_twice(tmp_path, fast):
    """Of a masked language model whose embedding is quantized, tied parameters are written for each name."""
    model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=66, **SIZES))
    tiny_model(tmp_path / "words")
    model.save_pretrained(tmp_path / "words")
    rules = [{"site": "{embedding}:weight", "quantizer": "uniform", "options": {"bits": 4}}]
    config = tiny_config(
        tmp_path, model__name=str(tmp_path / "words"), task="masked-lm", data__text_columns=["sentence"],
        quantization__preset=None, quantization__rules=rules, export__format="native", train__max_steps=1,
    )  # fmt: skip
    run = qpipe.execute(config)
    found = fixed_size(restore(run.out), [])
    file = (run.out / "export" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert found.other + found.quantized == len(file) - header


class Plain(Plugin):
    """A model with logits and nothing else of transformers'."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        class Bag(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.words, self.head = torch.nn.Embedding(len(VOCABULARY), 8), torch.nn.Linear(8, num_labels)

            def forward(self, input_ids, **others):
                return SimpleNamespace(logits=self.head(self.words(input_ids).mean(1)))

        return Bag()


class Renamed(Plugin):
    """A transformers model that none of its auto classes makes."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        class OurClassifier(hf.BertPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.bert, self.classifier = hf.BertModel(config), torch.nn.Linear(32, num_labels)
                self.post_init()

        return OurClassifier(hf.BertConfig(vocab_size=len(VOCABULARY), **SIZES))


@pytest.mark.parametrize(
    ("plugin", "rules", "error", "said"),
    [
        (Plain(), [], ModelError, "Bag without `save_pretrained` or `config`"),
        (Plain(), [{"site": "head:weight"}], ModelError, "Bag without `save_pretrained` or `config`"),
        (Renamed(), [{"site": "classifier:weight"}], FormatError, "no transformers auto class makes a OurClassifier"),
    ],
)
def test_what_could_not_be_saved_is_not_trained(plugin, rules, error, said, tmp_path, use):
    use(plugin)
    with pytest.raises(error, match=said):
        qpipe.execute(tiny_config(tmp_path, quantization__preset=None, quantization__rules=rules))
    assert checkpoint.steps(tmp_path / "run") == []


class Rounded(Quantizer):
    def quantize(self, value, out=None):
        return value.round() if out is None else out.copy_(value.round())


class OwnActivations(Plugin):
    @hookimpl
    def qpipe_quantizers(self):
        return [QuantizerKind("rounded", lambda options: Rounded(), Options, frozenset({"input"}))]


def test_activations_that_no_exporter_can_describe_are_not_trained(tmp_path, assembled):
    rules = [{"site": "classifier:input", "quantizer": "rounded"}]
    with pytest.raises(FormatError, match=r"classifier:input: no exporter can describe activations of Rounded"):
        assembled(tiny_config(tmp_path, quantization__preset="w4", quantization__rules=rules), OwnActivations())


def test_a_preset_leaves_out_an_embedding_that_cannot_be_quantized(tmp_path, assembled, warnings):
    """Gemma's scales what it looks up, in a class of its own."""
    config = tiny_config(tmp_path, quantization__preset="w4")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = hf.GemmaConfig(vocab_size=len(VOCABULARY), head_dim=8, num_key_value_heads=1, pad_token_id=0, **sizes)
    hf.GemmaForSequenceClassification(gemma).save_pretrained(config.model.name)
    run = assembled(config)
    assert len(run.plan.sites) == 7 and not any("embed" in name for name in run.plan.sites)
    said = [text for text in warnings() if "embed_tokens" in text]
    assert len(said) == 1 and "which cannot be quantized; preset w4 leaves it out" in said[0]


def test_hidden_states_of_two_stacks_are_refused(tmp_path, assembled):
    config = tiny_config(tmp_path, quantization__preset=None)
    stack = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    parts = {f"{part}_{name}": number for part in ("encoder", "decoder") for name, number in stack.items()}
    sizes = {"vocab_size": len(VOCABULARY), "d_model": 16, "max_position_embeddings": 66, "pad_token_id": 0}
    bart = hf.BartConfig(num_labels=2, **sizes, **parts)
    hf.BartForSequenceClassification(bart).save_pretrained(config.model.name)
    run = assembled(config)
    signals = {}
    run.instruments.want(frozenset({"hidden_states"}), signals)
    batch = run.data.collate([run.data.train[0]])
    batch["input_ids"][:, -1] = bart.eos_token_id
    with pytest.raises(ModelError, match="BartForSequenceClassification gives no hidden states of one stack"):
        output = run.student(**inputs_of(batch), output_hidden_states=True)
        run.instruments.take_outputs(output, frozenset({"hidden_states"}), signals)
