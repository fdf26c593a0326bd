"""Training that would quantize nothing does not start."""

import pytest
import torch
import transformers as hf

import qpipe
from qpipe import Options, Plugin, QTensor, Quantizer, QuantizerKind, TrainingError, WeightLoss, hookimpl
from qpipe.builtin.models import Models
from qpipe.quant import compiled
from qpipe.stages import checkpoint
from qpipe.stages.self_check import self_check
from qpipe.testing import tiny_config
from qpipe.testing.tiny import VOCABULARY


class Nothing(Quantizer):
    """Has a lattice and returns its input."""

    def encode(self, value):
        return QTensor(torch.zeros_like(value), torch.ones(1, 1), torch.zeros(1), 8)

    def quantize(self, value, out=None):
        return value.clone() if out is None else out.copy_(value)


class Idle(Plugin):
    @hookimpl
    def qpipe_quantizers(self):
        return [QuantizerKind("nothing", lambda options: Nothing(), Options, frozenset({"weight"}))]


class Spare(Plugin):
    """A model with a layer that its forward pass does not use."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        model = Models().qpipe_load_model(spec, task, num_labels, strict)
        model.bert.spare = torch.nn.Linear(4, 4)
        return model


class Coarse(Plugin):
    """A model whose head lies on the lattice of any quantizer."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        model = Models().qpipe_load_model(spec, task, num_labels, strict)
        with torch.no_grad():
            model.classifier.weight.fill_(0.5)
        return model


class Broken(Plugin):
    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        model = Models().qpipe_load_model(spec, task, num_labels, strict)
        model.classifier.bias.data.fill_(torch.inf)
        return model


def rules(*given):
    return {"quantization__preset": None, "quantization__rules": list(given)}


def test_quantization_that_changes_nothing_is_refused(tmp_path, use, fast):
    use(Coarse())
    config = tiny_config(tmp_path, **rules({"site": "classifier:weight", "options": {"bits": 2}}))
    with pytest.raises(TrainingError, match="rank 0: quantization does not change the model's output"):
        qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_forward_pass_that_is_not_the_lattice_is_refused_before_training(tmp_path, use, fast):
    """One that does nothing, among others that work."""
    use(Idle())
    nothing = {"site": "{block}.*:weight", "quantizer": "nothing"}
    config = tiny_config(tmp_path, **rules(nothing, {"site": "classifier:weight", "options": {"bits": 2}}))
    with pytest.raises(
        qpipe.FormatError, match=r"encode\(\).decode\(\) differs from the forward pass; Nothing.quantize"
    ):
        qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_quantizer_that_changes_nothing_is_named(tmp_path, use, fast, caplog):
    """The weights lie on its lattice already, which is no error."""
    use(Coarse())
    both = [{"site": "classifier:weight", "options": {"bits": 2}}, {"site": "{block}.*:weight", "options": {"bits": 4}}]
    with caplog.at_level("WARNING", "qpipe.stages"):
        qpipe.execute(tiny_config(tmp_path, **rules(*both), train__max_steps=1))
    assert "1 of 13 quantizers leave their values as they are, such as classifier:weight" in caplog.text


def test_a_site_that_never_runs_is_named(tmp_path, use, fast):
    use(Spare())
    config = tiny_config(tmp_path, quantization__rules=[{"site": "bert.spare:weight", "options": {"bits": 4}}])
    with pytest.raises(TrainingError, match="1 planned sites never ran in the forward pass, such as bert.spare:weight"):
        qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run") == []


class Penalty(Plugin):
    @hookimpl
    def qpipe_weight_losses(self, run):
        return [WeightLoss("small", lambda weight: weight.square().mean(), 1.0, lambda path: path == "bert.spare")]


@pytest.mark.parametrize("rules", [[], [{"site": "classifier:weight", "options": {"bits": 2}}]])
def test_a_penalty_on_a_weight_that_never_acts_is_refused(rules, tmp_path, use, fast):
    """It would be missing from the loss, and nobody would know."""
    use(Spare(), Penalty())
    config = tiny_config(tmp_path, quantization__preset=None, quantization__rules=rules)
    with pytest.raises(TrainingError, match=r"1 weights with a penalty \(small\) are not used.* such as bert.spare;"):
        qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_model_that_is_broken_before_training(tmp_path, use, fast):
    use(Broken())
    with pytest.raises(TrainingError, match="not finite before training has begun"):
        qpipe.execute(tiny_config(tmp_path))


def test_without_a_plan_there_is_nothing_to_prove(tmp_path, fast):
    run = qpipe.execute(tiny_config(tmp_path, quantization__preset=None, train__max_steps=1))
    assert "self_check" not in run.results and not (run.out / "export").exists()
    assert (run.out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("less", [0, 1])
def test_compiling_pays_from_as_many_elements_as_a_training_quantizes(less, tmp_path, assembled, monkeypatch):
    """32 x 32 weights once a step, their inputs [4, tokens, 32] in each of two passes; 7 steps."""
    site = "bert.encoder.layer.0.attention.self.query"
    chosen = [
        {"site": f"{site}:weight", "options": {"bits": 4}},
        {"site": f"{site}:input", "quantizer": "uniform-activation"},
    ]
    settings = {"train__batch_size": 8, "train__accumulation": 2, "train__max_steps": 7}
    run = assembled(tiny_config(tmp_path, **rules(*chosen), **settings))
    tokens = run.data.collate([run.data.train[i] for i in range(4)])["input_ids"].shape[1]
    monkeypatch.setattr(compiled, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(compiled, "WORTHWHILE", 7 * (32 * 32 + 2 * 4 * tokens * 32) + less)
    self_check(run)
    assert run.instruments.context.compiled == (less == 0)


@pytest.mark.parametrize(("setting", "expected"), [("on", False), ("auto", True)])
def test_code_that_did_not_compile_is_not_compiled_again(setting, expected, assembled, tmp_path, monkeypatch):
    """Only `auto` waits for the self-check, which counts what there is to quantize."""
    monkeypatch.setattr("qpipe.stages.self_check.use_compiled", lambda *given: True)
    run = assembled(tiny_config(tmp_path, quantization__preset="w4", quantization__compile=setting))
    run.instruments.context.compiled = False
    self_check(run)
    assert run.instruments.context.compiled is expected


def test_a_head_that_uses_a_tied_weight_without_being_called_is_refused(tmp_path, assembled):
    """MobileBERT's joins its weight with another one; the shared quantizer acts in the embedding alone."""
    (tmp_path / "text.txt").write_text("the movie was great fun\n" * 60)
    rules = [{"site": "{embedding}:weight", "quantizer": "uniform"}]
    changes = {"task": "masked-lm", "data__train": str(tmp_path / "text.txt"), "quantization__rules": rules}
    config = tiny_config(tmp_path, quantization__preset=None, **changes)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16, "intermediate_size": 32}
    counts = {"vocab_size": len(VOCABULARY), "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.MobileBertForMaskedLM(hf.MobileBertConfig(**sizes, **counts)).save_pretrained(config.model.name)
    run = assembled(config)
    with pytest.raises(TrainingError, match="MobileBert.* computes with the weight of .*decoder without calling"):
        self_check(run)


class Reads(Plugin):
    """A model whose forward pass does something with the table of its embedding besides looking up rows."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        model = Models().qpipe_load_model(spec, task, num_labels, strict)
        words, forward = model.bert.embeddings.word_embeddings, model.forward

        def reading(**inputs):
            output = forward(**inputs)
            output.logits = self.use(output.logits, words.weight)
            return output

        model.forward = reading
        return model


def in_one_tensor(parameters):
    """Make them parts of one tensor, as DeepSpeed does."""
    given = list(parameters)
    whole = torch.cat([parameter.data.flatten() for parameter in given])
    for parameter, part in zip(given, whole.split([p.numel() for p in given]), strict=True):
        parameter.data = part.view_as(parameter)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("reading", "function"),
    [
        (lambda logits, table: logits + (logits @ table.t()[:2]).sum(-1, keepdim=True), "matmul"),
        (lambda logits, table: logits + torch.cat([table[:2], table[:2]]).sum(), "cat"),
        (lambda logits, table: logits + torch.max(table, 0)[0].sum(), "max"),
        (lambda logits, table: logits.to(table.dtype) + torch.zeros_like(table).sum() * table.shape[0], None),
        (lambda logits, table: logits.to(table).type_as(table) + table.new(1).zero_() * table.isfinite().all(), None),
        (lambda logits, table: torch.vmap(lambda row: row + 1)(logits), None),  # as masks are made
        (lambda logits, table: torch.compile(lambda x: x * 2, fullgraph=True)(logits), None),
    ],
)
def test_a_weight_that_is_also_used_outside_its_module_is_refused(
    reading, function, flat, tmp_path, assembled, monkeypatch
):
    """There it would be trained in full precision, and exported quantized."""
    monkeypatch.setattr(Reads, "use", staticmethod(reading), raising=False)
    rules = [
        {"site": "{embedding}:weight", "quantizer": "uniform"},
        {"site": "{block}.*:weight", "quantizer": "uniform"},
    ]
    config = tiny_config(tmp_path, quantization__preset=None, quantization__rules=rules)
    run = assembled(config, Reads())
    if flat:
        in_one_tensor(run.student.parameters())
    if function is None:
        self_check(run)
        return
    message = f"computes with the weight of bert.embeddings.word_embeddings outside that module too .in {function}"
    with pytest.raises(TrainingError, match=message):
        self_check(run)
