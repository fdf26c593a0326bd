"""The plugin on a tiny BERT through the core's real instruments, without engine or data."""

from dataclasses import replace

import pytest
import ti_steps
import torch
from qpipe_teacher_intervention import (
    GradualIntervention,
    InterventionOptions,
    MapIntervention,
    OutputIntervention,
    TeacherIntervention,
)
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from qpipe import ConfigError, ModelError, TrainingError, TrainingPhase
from qpipe.stages import plan_run
from qpipe.testing import tiny_config

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def bert(seed, **config):
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **config}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=20, initializer_range=0.3, **shape, **no_dropout))


def make_run(tmp_path, student=None, teacher=None, **settings):
    return ti_steps.make_run(tmp_path, student or bert(0), teacher or bert(1), **settings)


def micro_step(plugin, run, index):
    return ti_steps.micro_step(plugin, run, index, BATCH)


def prepared(plugin, tmp_path, **options):
    run = make_run(tmp_path)
    instance = plugin(plugin.Options(**options))
    instance.qpipe_model_prepared(run)
    return instance, run


def gradients(run, loss):
    run.student.zero_grad()
    loss.backward()
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in run.student.named_parameters()}
    return {part: max(v for n, v in norms.items() if part in n and n.endswith("weight")) for part in PARTS}


PARTS = ("self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense", "word_embeddings")


def test_phases_signals_and_losses(tmp_path):
    plugin, run = prepared(GradualIntervention, tmp_path, fraction=0.5)
    seen = []
    assert plugin.qpipe_signals(run).teacher >= {"context", "probs"}, "before any step, what any step will need"
    for index in range(8):
        micro_step(plugin, run, index)
        seen.append((plugin.kind, plugin.qpipe_signals(run).teacher - plugin.qpipe_signals(run).student))
    assert seen[0] == ("output", frozenset())
    assert seen[1] == ("context", {"context"})
    assert seen[2] == seen[5] == ("map", {"probs"})
    assert seen[6] == (None, frozenset())


@pytest.mark.parametrize(("kind", "signal"), [("context", "context"), ("map", "probs")])
def test_the_teacher_takes_the_students_place(kind, signal, tmp_path):
    plugin, run = prepared(TeacherIntervention, tmp_path, schedule=kind, steps=1)
    step, _ = micro_step(plugin, run, 0)
    path = run.instruments.map.attention[0]
    seen = []
    found = run.instruments.attention(path)
    original = found.at

    def at(slot, x):
        result = original(slot, x)
        if slot == signal:
            seen.append(result.detach().clone())
        return result

    found.at = at
    ti_steps.forward(run.student, run.instruments, frozenset(), {}, BATCH)
    assert torch.equal(seen[0], step.teacher[signal, 0])


def test_the_output_block_is_the_teachers_and_capture_comes_before(tmp_path):
    plugin, run = prepared(OutputIntervention, tmp_path, steps=1)
    seen = {}
    name = run.instruments.map.attention_output[0]
    run.student.get_submodule(name).register_forward_hook(lambda m, a, out: seen.update(out=out.detach()))
    step, _ = micro_step(plugin, run, 0)
    assert torch.equal(seen["out"], step.teacher["attention_output", 0])
    assert not torch.equal(step.student["attention_output", 0], step.teacher["attention_output", 0])


@pytest.mark.parametrize(
    ("plugin", "replaced"),
    [(OutputIntervention, set()), (MapIntervention, {"probs"}), (GradualIntervention, {"probs"})],
)
def test_only_interventions_on_maps_look_at_them(plugin, replaced, tmp_path):
    """So that others work with models whose maps cannot be built, without the loss on scores."""
    _, run = prepared(plugin, tmp_path, steps=3, score_loss=0)
    assert {site.rpartition(":")[2] for site in run.instruments.tapped} & {"raw_scores", "scores", "probs"} == replaced
    assert [run.instruments.attention(path).expects_map() for path in run.instruments.map.attention] == [
        bool(replaced)
    ] * 2


def test_a_student_with_the_teachers_weights_is_left_as_it_is(tmp_path):
    run = make_run(tmp_path, bert(3), bert(3))
    plain = run.student(**BATCH).logits.detach()
    plugin = GradualIntervention()
    plugin.qpipe_model_prepared(run)
    for index in range(3):
        step, parts = micro_step(plugin, run, index)
        torch.testing.assert_close(step.output.logits, plain, rtol=1e-5, atol=1e-6)
        for name in ("ti/hidden", "ti/scores", "ti/output"):
            assert float(parts[name].detach()) < 1e-9


def test_no_intervention_outside_training_steps(tmp_path):
    run = make_run(tmp_path)
    plain = run.student(**BATCH).logits.detach()
    plugin = OutputIntervention()
    plugin.qpipe_model_prepared(run)
    micro_step(plugin, run, 0)
    assert torch.equal(run.student(**BATCH).logits, plain)


# What trains what, as measured on the reference (methods 2.2), for the loss on logits and hidden states.
@pytest.mark.parametrize(
    ("kind", "stopped"),
    [
        ("output", {"self.query", "self.key", "self.value", "attention.output.dense"}),
        ("context", {"self.query", "self.key", "self.value"}),
        ("map", {"self.query", "self.key"}),
    ],
)
def test_gradients_of_logits_and_hidden_states(kind, stopped, tmp_path):
    plugin, run = prepared(TeacherIntervention, tmp_path, schedule=kind, steps=1)
    _, parts = micro_step(plugin, run, 0)
    grads = gradients(run, parts["ti/logits"] + parts["ti/hidden"])
    assert {part for part, norm in grads.items() if norm == 0} == stopped


@pytest.mark.parametrize("kind", ["output", "context", "map"])
def test_the_score_loss_trains_query_and_key_of_its_layer_only(kind, tmp_path):
    plugin, run = prepared(TeacherIntervention, tmp_path, schedule=kind, steps=1)
    _, parts = micro_step(plugin, run, 0)
    grads = gradients(run, parts["ti/scores"])
    assert {part for part, norm in grads.items() if norm > 0} == {"self.query", "self.key"}


def test_the_output_loss_trains_value_and_output_under_output_intervention(tmp_path):
    plugin, run = prepared(OutputIntervention, tmp_path, steps=1)
    _, parts = micro_step(plugin, run, 0)
    grads = gradients(run, parts["ti/output"])
    assert grads["self.value"] > 0 and grads["attention.output.dense"] > 0
    assert grads["intermediate.dense"] == 0 and grads["word_embeddings"] == 0


def test_after_the_intervention_everything_trains(tmp_path):
    plugin, run = prepared(GradualIntervention, tmp_path, steps=3)
    _, parts = micro_step(plugin, run, 3)
    assert plugin.kind is None
    assert all(norm > 0 for norm in gradients(run, parts["ti/logits"]).values())


def test_no_attention_map_is_asked_for_without_need(tmp_path):
    plugin, run = prepared(GradualIntervention, tmp_path, score_loss=0, steps=6)
    needs = []
    for index in (0, 1, 2, 6):
        micro_step(plugin, run, index)
        run.instruments.context.taps_active = True
        needs.append(run.instruments.attention(run.instruments.map.attention[0]).needs_map())
        run.instruments.context.taps_active = False
        assert ("probs" in plugin.qpipe_signals(run).teacher) == (plugin.kind == "map")
    assert needs == [False, False, True, False]


def test_the_first_loss_replaces_the_task_loss(tmp_path):
    plugin, run = prepared(MapIntervention, tmp_path)
    assert [loss.replaces for loss in plugin.qpipe_losses(run)] == [("task",), (), (), ()]
    kept, run = prepared(MapIntervention, tmp_path, task_loss=True, logits_loss=0, hidden_loss=2.5)
    losses = list(kept.qpipe_losses(run))
    assert [loss.replaces for loss in losses] == [(), (), ()]
    assert losses[0].name == "ti/hidden" and losses[0].weight == 2.5


def test_regression_compares_logits_by_squared_error(tmp_path):
    run = make_run(tmp_path, bert(0, num_labels=1), bert(1, num_labels=1), kind="regression")
    plugin = MapIntervention()
    plugin.qpipe_model_prepared(run)
    step, parts = micro_step(plugin, run, 0)
    expected = (step.student["logits", 0] - step.teacher["logits", 0]).square().mean()
    torch.testing.assert_close(parts["ti/logits"], expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 1}, "2 attention layers .* has 1; .* set layer_map to 2 of the teacher's layers"),
        ({"num_attention_heads": 4}, "2 attention heads .* has 4"),
        ({"hidden_size": 32}, "16 hidden units .* has 32"),
    ],
)
def test_unequal_teachers_are_refused(config, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        GradualIntervention().qpipe_model_prepared(make_run(tmp_path, teacher=bert(1, **config)))


def test_logits_of_another_vocabulary_are_refused_where_they_are_compared(tmp_path):
    run = make_run(tmp_path, kind="causal-lm")
    run.teacher.config.vocab_size = 24
    with pytest.raises(ModelError, match="has 20 tokens in its vocabulary and teacher .* has 24"):
        GradualIntervention().qpipe_model_prepared(run)
    GradualIntervention(InterventionOptions(logits_loss=0, task_loss=True)).qpipe_model_prepared(run)


def resnet():
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape))


@pytest.mark.parametrize("plugin", [OutputIntervention, MapIntervention, GradualIntervention])
def test_models_without_attention_are_refused(plugin, tmp_path):
    for student, teacher in ((resnet(), resnet()), (bert(0), resnet())):
        with pytest.raises(ModelError, match="cannot find the attention of ResNetForImageClassification"):
            plugin().qpipe_model_prepared(make_run(tmp_path, student, teacher))


@pytest.mark.parametrize("plugin", [OutputIntervention, MapIntervention])
def test_projections_of_several_modules_are_refused(plugin, tmp_path):
    """Such as the sums that a binary model splits them into: gradients have no one input to stop at."""
    student = bert(0)
    attention = student.bert.encoder.layer[0].attention.self
    attention.query = torch.nn.Sequential(attention.query, torch.nn.Identity())
    with pytest.raises(ModelError, match=r"no site bert.*query:input, .* parts made of several modules"):
        plugin().qpipe_model_prepared(make_run(tmp_path, student))


@pytest.mark.parametrize("layer_map", [[1], [1, 2, 3], [2, 1], [1, 1], [1, 4]])
def test_a_map_of_layers_that_does_not_fit_is_refused(layer_map, tmp_path):
    run = make_run(tmp_path, teacher=bert(1, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"must have 2 rising numbers, .* from 1 to the teacher's 3"):
        GradualIntervention(InterventionOptions(layer_map=layer_map)).qpipe_model_prepared(run)


def test_a_map_of_layers_does_not_help_with_another_width(tmp_path):
    run = make_run(tmp_path, teacher=bert(1, num_hidden_layers=4, hidden_size=32))
    with pytest.raises(ModelError, match="16 hidden units .* has 32"):
        GradualIntervention(InterventionOptions(layer_map=[2, 4])).qpipe_model_prepared(run)


def test_the_loss_after_the_norm_needs_to_know_where_that_is(tmp_path):
    run = make_run(tmp_path)
    run.teacher_instruments.map = replace(run.teacher_instruments.map, sites={})
    with pytest.raises(ModelError, match="what enters the feed-forward networks of BertForSequenceClassification"):
        GradualIntervention(InterventionOptions(output_loss_on="norm")).qpipe_model_prepared(run)
    GradualIntervention().qpipe_model_prepared(run)


def test_two_steps_are_a_training_phase(tmp_path):
    run = make_run(tmp_path)
    options = InterventionOptions(preset="paper", steps=4, learning_rate=1e-3, warmup=0.5)
    plugin = GradualIntervention(options)
    assert list(plugin.qpipe_training_phases(run)) == [TrainingPhase("teacher-intervention", 4, 1e-3, 0.5)]
    # The core puts it behind the phases of plugins named before.
    run.phases = (TrainingPhase("other", 2), TrainingPhase("teacher-intervention", 4, 1e-3, 0.5, start=2))
    plugin.qpipe_model_prepared(run)
    assert plugin.schedule.to_json() == [
        {"kind": "output", "start": 2, "stop": 4},
        {"kind": "map", "start": 4, "stop": 6},
    ]
    assert not list(GradualIntervention().qpipe_training_phases(run))


def test_draws_are_those_of_the_runs_seed(tmp_path):
    for seed in (0, 5):
        run = make_run(tmp_path)
        run.config.seed = seed
        plugin = GradualIntervention(InterventionOptions(schedule="paper-stochastic"))
        plugin.qpipe_model_prepared(run)
        assert plugin.schedule.seed == seed


def test_fused_projections_are_refused_for_maps_only(tmp_path):
    run = make_run(tmp_path)
    found = run.instruments.map
    fused = tuple((query, query, query) for query, _, _ in found.attention_inputs)
    run.instruments.map = type(found)(found.blocks, found.attention, fused, found.attention_output)
    with pytest.raises(ModelError, match="one projection"):
        MapIntervention().qpipe_model_prepared(run)
    OutputIntervention().qpipe_model_prepared(run)


def test_an_intervention_longer_than_the_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="60 steps does not fit"):
        prepared(GradualIntervention, tmp_path, steps=60)


def test_resuming_needs_the_same_schedule(tmp_path):
    plugin, _ = prepared(GradualIntervention, tmp_path, steps=6)
    state = plugin.qpipe_state()
    same, _ = prepared(GradualIntervention, tmp_path, steps=6)
    same.qpipe_restore(state)
    other, _ = prepared(GradualIntervention, tmp_path, steps=7)
    with pytest.raises(TrainingError, match="same schedule"):
        other.qpipe_restore(state)


def test_metadata_survive_into_a_finished_run(tmp_path):
    plugin, run = prepared(GradualIntervention, tmp_path, steps=6)
    plugin.qpipe_run_start(run)
    phases = plugin.qpipe_export_metadata(run)["phases"]
    assert phases == [
        {"kind": "output", "start": 0, "stop": 1},
        {"kind": "context", "start": 1, "stop": 2},
        {"kind": "map", "start": 2, "stop": 6},
    ]
    finished = GradualIntervention()
    run.total_steps, run.teacher, run.teacher_instruments = 0, None, None
    finished.qpipe_model_prepared(run)
    assert finished.qpipe_export_metadata(run)["phases"] == phases


@pytest.mark.parametrize("name", ["ti-o", "ti-m", "ti-g"])
def test_a_plan_is_made_without_a_teacher(name, tmp_path):
    run = plan_run(tiny_config(tmp_path, {name: {}}))
    assert run.plan.sites and run.teacher is None and not run.trained
