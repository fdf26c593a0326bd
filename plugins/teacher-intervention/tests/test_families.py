"""Every family, each intervention: encoders, a pre-LN vision model, decoders with grouped heads."""

import pytest
import torch
import transformers as hf
from qpipe_teacher_intervention import InterventionOptions, TeacherIntervention
from ti_families import DECODERS, FAMILIES, batch, load
from ti_steps import make_run, micro_step

from qpipe import ModelError
from qpipe.builtin.models import Models
from qpipe.model.reduce import keep_layers
from qpipe.testing.tiny import VOCABULARY

KINDS = ("output", "context", "map")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
FUSED = {
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, **TOKENS, num_key_value_heads=2)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, **TOKENS)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **TOKENS, cls_token_id=2, sep_token_id=3)
    ),
}


def prepared(folder, family, student_seed=0, **options):
    student, teacher = load(folder, family, student_seed), load(folder, family, 1).eval()
    run = make_run(folder, student, teacher, kind="causal-lm" if family in DECODERS else "classification")
    plugin = TeacherIntervention(InterventionOptions(steps=1, **options))
    plugin.qpipe_model_prepared(run)
    return plugin, run


def trained(run, loss):
    """Paths of the modules whose weights have a gradient that is not zero."""
    run.student.zero_grad()
    loss.backward(retain_graph=True)
    grads = {name: p.grad for name, p in run.student.named_parameters() if p.grad is not None}
    return {name.removesuffix(".weight") for name, g in grads.items() if name.endswith(".weight") and bool(g.any())}


def projections(run):
    """Paths of query, key, value and output projections."""
    found = run.instruments.map
    names = [set(paths) for paths in zip(*found.attention_inputs, strict=True)]
    return [*names, set(found.attention_output)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_the_teachers_weights_is_left_as_it_is(family, tmp_path):
    """Only if what is replaced is replaced in the right place, and the whole of it."""
    plain = load(tmp_path, family, 1)(**batch(family)).logits
    for kind in KINDS:
        plugin, run = prepared(tmp_path, family, 1, schedule=kind)
        step, parts = micro_step(plugin, run, 0, batch(family))
        torch.testing.assert_close(step.output.logits, plain, rtol=1e-5, atol=1e-5)
        for name in ("ti/hidden", "ti/scores", "ti/output"):
            assert float(parts[name].detach()) < 1e-8, (kind, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains_what(family, tmp_path):
    for kind in KINDS:
        plugin, run = prepared(tmp_path, family, schedule=kind)
        step, parts = micro_step(plugin, run, 0, batch(family))
        query, key, value, output = projections(run)
        stopped = query | key | (set() if kind == "map" else value) | (output if kind == "output" else set())
        outer = trained(run, parts["ti/logits"] + parts["ti/hidden"])
        assert not outer & stopped, kind
        assert outer >= (value | output) - stopped, kind
        assert any(run.instruments.map.blocks[0] in name for name in outer), "the first block trains all the same"
        inner = {path for path in trained(run, parts["ti/scores"]) if not path.endswith("norm")}
        assert inner == query | key, kind
        # Under `context` nothing reads the student's values, in the authors' code neither.
        every = query | key | value | output
        own = trained(run, parts["ti/output"]) & every
        assert own == {"output": every, "context": output, "map": value | output}[kind]
        assert ("probs", 0) in step.teacher if kind == "map" else ("probs", 0) not in step.teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_after_the_norm_trains_the_residual_stream(family, tmp_path):
    plugin, run = prepared(tmp_path, family, schedule="output", output_loss_on="norm")
    step, parts = micro_step(plugin, run, 0, batch(family))
    query, key, value, output = projections(run)
    found = trained(run, parts["ti/output"])
    assert found and not found & (query | key | value | output), "which the replacement cuts off"
    assert ("attention_output", 0) not in step.student
    assert {key for key in step.student if key[0] == "ffn_input"} == {("ffn_input", 0), ("ffn_input", 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused_unless_a_map_is_replaced(family, tmp_path):
    for kind in KINDS:
        plugin, run = prepared(tmp_path, family, schedule=kind, score_loss=0)
        micro_step(plugin, run, 0, batch(family))
        for found in (run.instruments, run.teacher_instruments):
            found.context.taps_active = True
            assert found.attention(found.map.attention[0]).needs_map() == (kind == "map")
            found.context.taps_active = False


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_have_the_same_gradients(family, tmp_path):
    for kind in KINDS:
        found = []
        for recompute in (False, True):
            plugin, run = prepared(tmp_path, family, schedule=kind)
            if recompute:
                run.student.activation_checkpointing_enable({"use_reentrant": False})
            _, parts = micro_step(plugin, run, 0, batch(family))
            run.instruments.context.taps_active = True  # as in training, until backward has ended
            torch.stack(list(parts.values())).sum().backward()
            found.append({name: p.grad for name, p in run.student.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7, msg=f"{kind}: {name}")


def test_a_student_of_half_the_depth_takes_the_layers_it_is_told(tmp_path):
    student = load(tmp_path, "bert", 0, num_hidden_layers=2)
    teacher = load(tmp_path, "bert", 1, num_hidden_layers=4).eval()
    run = make_run(tmp_path, student, teacher)
    plugin = TeacherIntervention(InterventionOptions(schedule="output", steps=1, layer_map=[2, 4]))
    plugin.qpipe_model_prepared(run)
    assert plugin.layer_map == (2, 4), "which analyses go by"
    seen = {}
    for layer, path in enumerate(run.instruments.map.attention_output):
        student.get_submodule(path).register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: out}))
    step, parts = micro_step(plugin, run, 0, batch("bert"))
    for layer, theirs in ((0, 1), (1, 3)):
        assert torch.equal(seen[layer], step.teacher["attention_output", theirs])
    squares = [
        (step.student["hidden_states", i] - step.teacher["hidden_states", j]).square().mean()
        for i, j in ((0, 0), (1, 2), (2, 4))
    ]
    torch.testing.assert_close(parts["ti/hidden"], sum(squares))


@pytest.mark.parametrize("family", DECODERS)
def test_states_of_a_layer_in_the_middle_are_those_of_a_last_one(family, tmp_path):
    """A student that is the first half of the teacher is at no distance, whatever normalisation follows its last."""
    student, teacher = (load(tmp_path, family, 1, num_hidden_layers=4) for _ in range(2))
    keep_layers(student, Models().qpipe_model_map(student).blocks, [0, 1])
    run = make_run(tmp_path, student, teacher.eval(), kind="causal-lm")
    plugin = TeacherIntervention(InterventionOptions(steps=1, schedule="output", layer_map=[1, 2]))
    plugin.qpipe_model_prepared(run)
    _, parts = micro_step(plugin, run, 1, batch(family))
    assert float(parts["ti/hidden"].detach()) == 0 and float(parts["ti/logits"].detach()) > 0


@pytest.mark.parametrize("kind", ["output", "context"])
@pytest.mark.parametrize("family", FUSED)
def test_one_projection_for_query_key_and_value(family, kind, tmp_path):
    """Outputs and contexts can stand in; a map cannot, as no gradient could be stopped at query and key alone."""
    student, teacher = (FUSED[family]() for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    run = make_run(tmp_path, student.train(), teacher.eval(), kind="causal-lm")
    plugin = TeacherIntervention(InterventionOptions(steps=1, schedule=kind))
    plugin.qpipe_model_prepared(run)
    step, parts = micro_step(plugin, run, 0, batch("llama"))
    torch.testing.assert_close(step.output.logits, teacher(**batch("llama")).logits, rtol=1e-5, atol=1e-5)
    for name in ("ti/hidden", "ti/scores", "ti/output"):
        assert float(parts[name].detach()) < 1e-8, name
    with pytest.raises(ModelError, match="one projection"):
        TeacherIntervention(InterventionOptions(steps=1, schedule="map")).qpipe_model_prepared(run)
