"""The student's forward pass under each intervention, bit for bit that of the authors' code; and its gradients.

Golden family `ti_forward`: a BERT of 2 layers, ternary weights, 8-bit activations, no dropout.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from qpipe_teacher_intervention import InterventionOptions, TeacherIntervention
from safetensors.torch import load_file
from ti_steps import make_run, micro_step
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from qpipe import Quantizer, TapStage
from qpipe.host import load_plugins

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "ti_forward.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "ti_forward.safetensors")
SCHEDULES = {"none": "map", "TI-M": "map", "TI-C": "context", "TI-O": "output"}
CLIP = 2.5
ALL = frozenset({"probs", "context", "attention_output"})
"""Signals that the losses do not take. The student's are its own, though the teacher's may go on."""
SWAP = {"position_embeddings": "token_type_embeddings", "token_type_embeddings": "position_embeddings"}
"""That code adds positions before types, transformers the other way round: with both swapped they agree."""


class Clipped(Quantizer):
    """No gradient where the value is clipped."""

    def surrogate(self, value):
        return torch.where(value.abs() < CLIP, value, value.detach())


class Ternary(Clipped):
    """Ternary weights, with a scale for the whole tensor or for each row."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def quantize(self, value, out=None):
        weight = value.clamp(-CLIP, CLIP)
        axes = (1,) if self.rows else (0, 1)
        mean = weight.norm(p=1, dim=axes, keepdim=True) / (weight.shape[1] if self.rows else weight.numel())
        kept = weight.abs() > 0.7 * mean
        scale = (weight.abs() * kept).sum(axes, keepdim=True) / kept.sum(axes, keepdim=True)
        return scale * (kept & (weight > 0)) - scale * (kept & (weight < 0))


class EightBits(Clipped):
    """Symmetric codes up to 127, over the range of the tensor."""

    def quantize(self, value, out=None):
        clipped = value.clamp(-CLIP, CLIP)
        steps = 127 / clipped.abs().max()
        return (clipped * steps).round() / steps


def swapped(name):
    for ours, theirs in SWAP.items():
        if f"{ours}." in name:
            return name.replace(ours, theirs)
    return name


def bert():
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=2,
            type_vocab_size=12,
            hidden_act="gelu_python",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    prefix = "c00.weights."
    model.load_state_dict(
        {swapped(name.removeprefix(prefix)): value for name, value in TENSORS.items() if name.startswith(prefix)},
        strict=False,
    )
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 1.0  # that code divides by sqrt(8), which rounds otherwise; see `divide`
    return model


def divide(found):
    """Scale attention scores by dividing them."""
    for path in found.map.attention:
        found.add_tap(f"{path}:raw_scores", TapStage.OBSERVE, lambda x: x / math.sqrt(8))


def quantize(run):
    """Put quantizers where that code has them."""
    for site in run.instruments.sites.values():
        linear = site.module_type == "Linear" and site.path != "classifier"
        if site.name == "bert.embeddings.word_embeddings:weight" or (linear and site.slot == "weight"):
            run.instruments.put(site, Ternary(rows=not linear))
        elif (linear and site.slot == "input") or site.slot in ("query", "key", "value", "probs"):
            run.instruments.put(site, EightBits())


def quantize_by_plugins(run):
    """The same places, with what users of `ternary-twn` and the preset `a8-inputs-clipped` get."""
    kinds = load_plugins({"ternary-twn": {}}).collect("qpipe_quantizers")
    weights, values = kinds["ternary-twn"], kinds["uniform-activation"]
    for site in run.instruments.sites.values():
        linear = site.module_type == "Linear" and site.path != "classifier"
        if site.name == "bert.embeddings.word_embeddings:weight" or (linear and site.slot == "weight"):
            rows = "tensor" if linear else "channel"
            run.instruments.put(site, weights.build(weights.options(granularity=rows)))
        elif (linear and site.slot == "input") or site.slot in ("query", "key", "value", "probs"):
            options = values.options(bits=8, granularity="tensor", narrow=True, clip=CLIP)
            run.instruments.put(site, values.build(options))


def batch():
    ids, types = TENSORS["c00.input_ids"], TENSORS["c00.segment_ids"]
    return {
        "input_ids": ids,
        "position_ids": types,
        "token_type_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "attention_mask": TENSORS["c00.input_mask"],
    }


@pytest.fixture(params=CASES, ids=[case["params"]["mode"].split()[0] for case in CASES])
def recorded(request):
    return request.param


@pytest.fixture
def case(recorded, tmp_path):
    """`(case, step, weighted losses by name, student)` after one step."""
    return recorded, *one_step(recorded, tmp_path)


def one_step(recorded, folder, said=None, put=quantize):
    """`(step, weighted losses by name, student)`; `said` replaces what the teacher says."""
    mode = recorded["params"]["mode"].split()[0]
    run = make_run(folder, bert(), bert())
    put(run)
    divide(run.instruments)
    divide(run.teacher_instruments)
    plugin = TeacherIntervention(InterventionOptions(schedule=SCHEDULES[mode], steps=1, output_loss_on="norm"))
    plugin.qpipe_model_prepared(run)
    step, parts = micro_step(plugin, run, 1 if mode == "none" else 0, batch(), ALL, said)
    return step, parts, run


def stored(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"]


def linear(weights, name, x, quantized):
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if quantized:
        x, weight = EightBits().quantize(x), Ternary(rows=False).quantize(weight)
    return F.linear(x, weight, bias)


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)


def by_hand(weights, inputs, mode="none", teacher=None):
    """The forward pass written out: every signal by kind and layer.

    Args:
        weights: by the names of transformers.
        inputs: of the model.
        mode: what of the teacher stands in for the student's.
        teacher: its signals; None for the teacher itself, which is not quantized.
    """
    quantized, found = teacher is not None, {}
    codes = EightBits().quantize if quantized else (lambda x: x)
    words = weights["bert.embeddings.word_embeddings.weight"]
    if quantized:
        words = Ternary(rows=True).quantize(words)
    x = F.embedding(inputs["input_ids"], words)
    x = x + F.embedding(inputs["token_type_ids"], weights["bert.embeddings.token_type_embeddings.weight"])
    x = x + F.embedding(inputs["position_ids"], weights["bert.embeddings.position_embeddings.weight"])
    x = found["hidden_states", 0] = norm(weights, "bert.embeddings.LayerNorm", x)
    added = (1.0 - inputs["attention_mask"][:, None, None, :].float()) * -10000.0

    def stands_in(name, kind, layer, own):
        return teacher[kind, layer] if quantized and mode == name else own

    for layer in range(2):
        path = f"bert.encoder.layer.{layer}"
        query, key, value = (
            codes(linear(weights, f"{path}.attention.self.{n}", x, quantized).view(*x.shape[:2], 2, 8).transpose(1, 2))
            for n in ("query", "key", "value")
        )
        scores = found["scores", layer] = query @ key.transpose(-1, -2) / math.sqrt(8)
        probs = found["probs", layer] = torch.softmax(scores + added, -1)
        probs = stands_in("TI-M", "probs", layer, probs)
        context = found["context", layer] = (codes(probs) @ value).transpose(1, 2).contiguous()
        context = stands_in("TI-C", "context", layer, context)
        out = linear(weights, f"{path}.attention.output.dense", context.flatten(2), quantized)
        found["attention_output", layer] = out
        out = stands_in("TI-O", "attention_output", layer, out)
        h = found["ffn_input", layer] = norm(weights, f"{path}.attention.output.LayerNorm", out + x)
        hidden = linear(weights, f"{path}.intermediate.dense", h, quantized)
        hidden = hidden * 0.5 * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
        y = linear(weights, f"{path}.output.dense", hidden, quantized)
        x = found["hidden_states", layer + 1] = norm(weights, f"{path}.output.LayerNorm", y + h)
    pooled = torch.tanh(linear(weights, "bert.pooler.dense", x[:, 0], quantized))
    found["logits", 0] = linear(weights, "classifier", pooled, False)
    return found


def test_forward_is_the_equations_bit_for_bit(case):
    """On any machine: what is recorded has the rounding of the one that recorded it."""
    case, step, _, _ = case
    weights = dict(bert().state_dict())
    with torch.no_grad():
        teacher = by_hand(weights, batch())
        student = by_hand(weights, batch(), case["params"]["mode"].split()[0], teacher)
    for signals, expected in ((step.teacher, teacher), (step.student, student)):
        compared = [key for key in signals if key in expected]
        assert len(compared) >= 1 + 3 + 2 * len(ALL)
        for key in compared:
            assert torch.equal(signals[key], expected[key]), key


NAMES = {
    "hidden_states": "rep",
    "scores": "att_scores",
    "probs": "att_probs",
    "context": "context",
    "attention_output": "self_output_dense",
    "ffn_input": "attn_output",
}
"""Signals by the names under which they are recorded."""


def as_recorded(kind, value):
    """A signal in the form in which it is recorded: scores with the mask, contexts with heads first."""
    if kind == "scores":
        return value + (1.0 - TENSORS["c00.input_mask"][:, None, None, :].float()) * -10000.0
    return value.transpose(1, 2) if kind == "context" else value


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or "MKL_CBWR" in os.environ,
    reason="bits were recorded with vector instructions: exponentials and sums round otherwise without them",
)
def test_the_student_is_that_of_the_reference_bit_for_bit(recorded, tmp_path):
    """Given what the reference's teacher said: processors with AVX2 or AVX-512 round products of codes alike.

    The classifier, like the teacher, multiplies numbers that are on no grid.
    """
    kinds = {"probs": "att_probs", "context": "context", "attention_output": "self_output_dense"}
    said = {(kind, n): TENSORS[f"c00.teacher_{name}{n}"] for kind, name in kinds.items() for n in range(2)}
    said |= {key: value.transpose(1, 2) for key, value in said.items() if key[0] == "context"}
    step, _, _ = one_step(recorded, tmp_path, said)
    compared = {(kind, layer): value for (kind, layer), value in step.student.items() if kind in NAMES}
    assert len(compared) == 3 + 5 * 2
    for (kind, layer), value in compared.items():
        assert torch.equal(as_recorded(kind, value), stored(recorded, f"{NAMES[kind]}{layer}")), (kind, layer)
    torch.testing.assert_close(step.student["logits", 0], stored(recorded, "logits"), rtol=0, atol=2e-7)


def test_forward_is_that_of_the_reference_bit_for_bit(case):
    """Where matrix products round as on the machine that recorded it, which the teacher shows; else closely."""
    case, step, _, run = case
    assert len(run.instruments.quantizers()) == 2 * (6 + 6 + 4) + 2 + 1
    with torch.no_grad():
        plain = by_hand(dict(bert().state_dict()), batch())
    scores = [as_recorded("scores", plain["scores", n]) for n in range(2)]
    rounds_alike = all(torch.equal(value, TENSORS[f"c00.teacher_att_scores{n}"]) for n, value in enumerate(scores))

    def require_equal(found, expected, what):
        if rounds_alike:
            assert torch.equal(found, expected), what
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")

    sides = (
        (step.student, lambda name: stored(case, name)),
        (step.teacher, lambda name: TENSORS["c00.teacher_" + name]),
    )
    for signals, expected in sides:
        require_equal(signals["logits", 0], expected("logits"), "logits")
        for (kind, layer), value in signals.items():
            if kind in NAMES:
                require_equal(as_recorded(kind, value), expected(f"{NAMES[kind]}{layer}"), (kind, layer))
    assert sum(kind in NAMES for kind, _ in step.student) == 3 + 5 * 2


def test_shipped_quantizers_have_the_forward_of_the_reference(recorded, tmp_path):
    """Theirs multiply codes by steps where that code divides, so that some roundings differ."""
    step, _, run = one_step(recorded, tmp_path, put=quantize_by_plugins)
    assert len(run.instruments.quantizers()) == 2 * (6 + 6 + 4) + 2 + 1
    for (kind, layer), value in step.student.items():
        if kind in NAMES:
            expected = stored(recorded, f"{NAMES[kind]}{layer}")
            torch.testing.assert_close(as_recorded(kind, value), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.student["logits", 0], stored(recorded, "logits"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("put", [quantize, quantize_by_plugins])
def test_losses_and_gradients_are_those_of_the_reference(recorded, put, tmp_path):
    case, (_, parts, run) = recorded, one_step(recorded, tmp_path, put=put)
    names = {"ti/logits": "cls", "ti/hidden": "rep", "ti/scores": "att", "ti/output": "output"}
    for name, part in parts.items():
        assert part.item() == pytest.approx(case["scalars"][names[name]], rel=1e-6)
    torch.stack(list(parts.values())).sum().backward()
    untrained = case["scalars"]["params_without_any_grad"]
    for name, parameter in run.student.named_parameters():
        if swapped(name) in untrained:  # ours are zero instead of missing, so that ZeRO-3 works
            assert not parameter.grad.any(), name
        else:
            expected = stored(case, f"grad.{swapped(name)}")
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=2e-7)
    mode = case["params"]["mode"].split()[0]
    assert len(untrained) == {"none": 0, "TI-M": 0, "TI-C": 4, "TI-O": 8}[mode]
