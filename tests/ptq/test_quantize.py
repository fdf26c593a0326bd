"""Quantizing without training: what each method promises, on a model of a few kilobytes."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import qpipe
from qpipe import ConfigError, DataError, ModelError, Plugin, hookimpl, stages
from qpipe.host import load_plugins
from qpipe.quant.affine import without_padding
from qpipe.stages import evaluate_run, execute, quantize, sensitivity
from qpipe.stages.initialize import initialize
from qpipe.stages.layers import _positions as positions_of
from qpipe.stages.layers import calibration_data, full_precision_copy, inputs_to, layers_in_order
from qpipe.stages.quantize import _prepared
from qpipe.stages.sizes import stored_sizes
from qpipe.stages.sweep import Sweep, evaluate_points
from qpipe.stages.trained import restore
from qpipe.stages.variants import rebuilt, require_master_copies
from qpipe.testing import check_rules, run_distributed, tiny_config
from qpipe.testing.gradients import compare, write_traces
from qpipe.testing.tiny import VOCABULARY

QUICK = {"examples": 64, "batch_size": 16, "iterations": 100, "evaluations": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tuned model at `trained/model`."""
    folder = tmp_path_factory.mktemp("ptq")
    config = tiny_config(
        folder,
        quantization__preset=None,
        train__max_steps=60,
        train__learning_rate=3e-3,
        train__save_every=60,
        train__eval_every=60,
    )
    execute(config.model_copy(update={"out": str(folder / "trained")}))
    return folder


def config(folder, preset="w3", out="run", learned=None, **ptq):
    """Weights of a preset, or with steps that training will learn, of `learned` bits."""
    lsq = {"site": "{block}.*:weight", "quantizer": "lsq", "options": {"bits": learned}}
    return tiny_config(
        folder,
        model__name=str(folder / "trained" / "model"),
        quantization__preset=None if learned else preset,
        quantization__rules=[lsq] if learned else [],
        quantization__ptq={**QUICK, **ptq},
        out=str(folder / out),
    )


def prepared(folder, **ptq):
    run = _prepared(config(folder, **ptq), load_plugins({}))
    original = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    return run, original


def codes(run):
    return {
        site: q.encode(run.student.get_parameter(f"{site.removesuffix(':weight')}.weight").detach())
        for site, q in run.instruments.quantizers().items()
        if site.endswith(":weight")
    }


# --- the command's stages ---------------------------------------------------------------------------------------------


def test_a_run_directory_like_any_other(folder):
    static = {"site": "{block}.*output.dense:input", "quantizer": "uniform-activation"}
    rules = [{**static, "options": {"granularity": "tensor", "dynamic": False}}]
    made = config(folder, out="whole", weights="adaround", bias_correction=True)
    quantization = made.quantization.model_copy(
        update={"rules": tuple(map(qpipe.config.RuleConfig.model_validate, rules))}
    )
    run = quantize(made.model_copy(update={"quantization": quantization}))
    results = json.loads((run.out / "results.json").read_text())
    assert results["verified"] and results["steps"] == 0
    assert "without training, with qpipe" in (run.out / "export" / "README.md").read_text()
    assert results["teacher"]["accuracy"] > 0.9, "the full-precision model is measured"
    assert results["reloaded"] == results["evaluation"] == evaluate_run(run.out)
    assert set(results["seconds"]) == {"build", "evaluate", "quantize", "export", "verify"}
    assert {entry["quantizer"] for entry in run.plan.to_json()} == {"uniform-static", "uniform-activation"}
    again = restore(run.out)
    for site, lattice in codes(run).items():
        assert torch.equal(codes(again)[site].codes, lattice.codes), site
    statics = [q for s, q in run.instruments.quantizers().items() if s.endswith(":input")]
    assert statics and all(bool(torch.isfinite(q.scale).all()) for q in statics), "activations are calibrated"


def test_a_finished_run_is_loaded_without_searching_again(folder, monkeypatch):
    made = config(folder, out="loaded", range="lp")
    rule = {"site": "*.0.*:weight", "quantizer": "lsq", "options": {"bits": 3, "init": "mse"}}
    rules = (qpipe.config.RuleConfig.model_validate(rule),)
    changes = {"rules": rules, "scale_dtype": "bfloat16"}
    run = quantize(made.model_copy(update={"quantization": made.quantization.model_copy(update=changes)}))
    wanted = codes(run)
    assert {entry["quantizer"] for entry in run.plan.to_json()} == {"uniform-static", "lsq"}
    for module in ("qpipe.quant.static", "qpipe.builtin.lsq"):
        monkeypatch.setattr(f"{module}.search_grid", lambda *args, **options: pytest.fail("searched again"))
    again = restore(run.out)
    assert again.plan.to_json() == run.plan.to_json()
    for site, lattice in codes(again).items():
        assert torch.equal(lattice.codes, wanted[site].codes) and torch.equal(lattice.scale, wanted[site].scale), site
    assert evaluate_run(run.out) == run.results["evaluation"]


def test_ranges_without_data_leave_the_weights_alone(folder):
    run, original = prepared(folder, range="min-max")
    initialize(run)
    assert "ptq" not in run.results
    assert all(torch.equal(p, original[name]) for name, p in run.student.named_parameters())


@pytest.mark.parametrize(("examples", "sizes"), [(100, [16] * 6 + [4]), (128, [16] * 8), (5, [5])])
def test_exactly_as_many_examples_as_asked_for(folder, examples, sizes):
    run, _ = prepared(folder, weights="lapq", examples=examples, evaluations=1)
    assert len(run.data.train) == 128
    assert [len(batch["labels"]) for batch in calibration_data(run)] == sizes


def test_every_example_counts_as_much_in_the_loss_of_lapq(folder):
    """Also those of a smaller last batch: the same losses as with one batch of them all."""
    found = []
    for size in (16, 20):
        run, _ = prepared(folder, weights="lapq", examples=20, batch_size=size, evaluations=1)
        initialize(run)
        found.append(run.results["ptq"])
    assert found[0]["examples"] == found[1]["examples"] == 20
    assert found[0]["lapq"]["losses"] == pytest.approx(found[1]["lapq"]["losses"], rel=1e-5)


# --- AdaRound ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(folder):
    run, original = prepared(folder, weights="adaround")
    before = codes(run)
    initialize(run)
    return run, original, before


def test_adaround_lowers_the_error_of_every_layer(rounded):
    layers = rounded[0].results["ptq"]["layers"]
    assert len(layers) == 12, "six linear maps in each of two blocks"
    assert all(layer["after"] < 0.9 * layer["before"] for layer in layers.values()), layers


def test_adaround_moves_codes_by_one_at_most_and_the_weights_onto_them(rounded):
    run, original, before = rounded
    moved = 0
    for site, after in codes(run).items():
        name = f"{site.removesuffix(':weight')}.weight"
        weight = run.student.get_parameter(name).detach()
        assert torch.equal(after.scale, before[site].scale), "the grid stays"
        if "embedding" in site:
            assert torch.equal(weight, original[name])
            continue
        assert torch.equal(after.decode(), weight), "the stored weight lies on the grid"
        between = (original[name] / before[site].scale).clamp(-4, 3)
        assert float((after.codes - between).abs().max()) < 1, "up or down, nothing else"
        moved += int((after.codes != before[site].codes).sum())
    assert moved > 0


def test_adaround_changes_nothing_but_rounded_weights(rounded):
    run, original, _ = rounded
    kept = [n for n, p in run.student.named_parameters() if torch.equal(p, original[n])]
    assert sorted(set(original) - set(kept)) == sorted(f"{path}.weight" for path in run.results["ptq"]["layers"])


def test_adaround_makes_up_for_what_earlier_layers_have_lost(folder, monkeypatch):
    """A layer's input comes from the network as rounded so far, its target from the full-precision one."""
    run, _ = prepared(folder, weights="adaround", iterations=5)
    reference, batches, unequal = full_precision_copy(run.student), calibration_data(run), []
    rounding = stages.initialize.round_layer

    def checked(layer, inputs, target, *rest):
        with torch.no_grad():
            assert torch.equal(inputs, inputs_to(run.student, layer.path, batches))
            full = inputs_to(reference, layer.path, batches)
            assert torch.equal(target, layer.output(full, reference.get_submodule(layer.path).weight))
            unequal.append(not torch.equal(inputs, full))
        rounding(layer, inputs, target, *rest)

    monkeypatch.setattr(stages.initialize, "round_layer", checked)
    initialize(run)
    assert unequal == [True] * 12, "the embedding is quantized before the first"


BLOCK = "bert.encoder.layer.0.output.dense:weight"


def min_max_scale(weight, bits):
    """Of each row, by hand: the largest weight on the largest code; 1 for a row of zeros, such as that of [PAD]."""
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale, 1.0)


def test_other_widths_and_steps_of_rounded_weights_are_refused(rounded):
    """There is no master copy to find them from; weights that kept their rounding have one."""
    run, original, _ = rounded
    told = r"attention.self.query:weight was rounded by quantization.ptq.weights: adaround, and .*run has no full-prec"
    for kind in ("bits", "step", "pow2"):
        with pytest.raises(ConfigError, match=told):
            evaluate_points(run, Sweep((kind,), bits=(4,), ratios=(0.9,)))
    with pytest.raises(ConfigError, match="query:weight was rounded"):
        stored_sizes(run, (2, 4))
    embedding = "bert.embeddings.word_embeddings:weight"
    with rebuilt(run, [embedding], 2):
        weight, lattice = original["bert.embeddings.word_embeddings.weight"], codes(run)[embedding]
    assert lattice.bits == 2 and set(lattice.codes.unique().tolist()) == {-2, -1, 0, 1}
    largest = min_max_scale(weight, 2)
    assert bool((lattice.scale <= largest).all()), "the range of least squares is no wider than that of all weights"
    errors, limits = ((t - weight).square().sum(1) for t in (lattice.decode(), (weight / largest).round() * largest))
    assert bool((errors <= limits).all()) and float(errors.sum()) < 0.9 * float(limits.sum())
    assert float((lattice.decode() - weight).abs().div(largest).median()) <= 0.5


def test_rounded_weights_that_were_trained_on_have_other_widths(folder):
    """By a hundredth, more than half a step of 8 bits, so that levels of 3 bits would be too far away."""
    run, _ = prepared(folder, weights="adaround", iterations=2, range="min-max")
    initialize(run)
    with torch.no_grad():
        run.student.get_parameter(BLOCK.replace(":", ".")).mul_(1.01)
    run.instruments.context.weights_changed()
    assert codes(run)[BLOCK].bits == 3
    with rebuilt(run, [BLOCK], 8):
        weight, lattice = run.student.get_parameter(BLOCK.replace(":", ".")).detach(), codes(run)[BLOCK]
    assert lattice.bits == 8
    scale = min_max_scale(weight, 8)
    torch.testing.assert_close(lattice.scale, scale)
    assert bool(((lattice.decode() - weight).abs() <= 0.501 * scale).all())
    with pytest.raises(ConfigError, match="query:weight was rounded"):
        require_master_copies(run, run.plan.sites)


def test_sensitivity_of_a_rounded_run_is_refused(folder):
    run = quantize(config(folder, out="sensitive", weights="adaround", iterations=2))
    with pytest.raises(ConfigError, match="query:weight was rounded .*use the model that was quantized"):
        sensitivity.load(run.out)


# --- bias correction --------------------------------------------------------------------------------------------------


def test_bias_correction_restores_the_mean_of_every_output(folder):
    run, original = prepared(folder, bias_correction=True)
    reference = full_precision_copy(run.student)
    initialize(run)
    batches = calibration_data(run)
    with torch.no_grad():
        for layer in layers_in_order(run, batches):
            there = reference.get_submodule(layer.path)
            wanted = there(inputs_to(reference, layer.path, batches)).mean(0)
            inputs = inputs_to(run.student, layer.path, batches)
            plain = layer.output(inputs, layer.quantizer(layer.module.weight))
            torch.testing.assert_close((plain + layer.module.bias).mean(0), wanted, rtol=0, atol=1e-5)
            assert float((plain.mean(0) + original[f"{layer.path}.bias"] - wanted).abs().max()) > 1e-4


# --- LAPQ -------------------------------------------------------------------------------------------------------------


def test_lapq_lowers_the_loss_and_keeps_the_weights(folder):
    run, original = prepared(folder, preset="w2", weights="lapq")
    initialize(run)
    found = run.results["ptq"]["lapq"]
    assert found["loss"] <= found["start_loss"] <= min(found["losses"])
    assert found["evaluations"] <= 40 + 11
    assert all(torch.equal(p, original[name]) for name, p in run.student.named_parameters())
    assert all(bool((lattice.scale > 0).all()) for lattice in codes(run).values())


@pytest.mark.parametrize("method", ["lapq", "adaround"])
def test_steps_that_training_learns_start_from_it(folder, method):
    """LAPQ chooses the first steps, AdaRound rounds on the steps of `init`; the parameters hold both."""
    run, original = prepared(folder, learned=2, weights=method)
    before = codes(run)
    initialize(run)
    after = codes(run)
    found = run.results["ptq"]
    assert len(after) == 12
    for site, lattice in after.items():
        path = site.removesuffix(":weight")
        step = run.instruments.quantizers()[site].step
        assert isinstance(step, torch.nn.Parameter) and step.requires_grad
        torch.testing.assert_close(lattice.scale, step.detach().view_as(lattice.scale), rtol=0, atol=0)
        weight = run.student.get_parameter(f"{path}.weight").detach()
        if method == "lapq":
            assert torch.equal(weight, original[f"{path}.weight"])
            assert not torch.equal(lattice.scale, before[site].scale)
        else:
            assert torch.equal(lattice.scale, before[site].scale)
            assert torch.equal(lattice.decode(), weight), "the stored weight lies on the grid"
            assert found["layers"][path]["after"] < found["layers"][path]["before"]
    if method == "lapq":
        assert found["lapq"]["loss"] <= found["lapq"]["start_loss"]
    else:
        with pytest.raises(ConfigError, match="query:weight was rounded by quantization.ptq.weights: adaround"):
            require_master_copies(run, run.plan.sites)


def test_clips_are_kept_at_their_width_and_found_anew_at_others(folder):
    run, original = prepared(folder, preset="w2", weights="lapq", range="min-max")
    initialize(run)
    chosen = codes(run)
    with rebuilt(run, [BLOCK], 2):
        assert torch.equal(codes(run)[BLOCK].scale, chosen[BLOCK].scale)
        assert torch.equal(codes(run)[BLOCK].codes, chosen[BLOCK].codes)
    largest = original[BLOCK.replace(":", ".")].abs().amax(1, keepdim=True)
    assert not torch.allclose(chosen[BLOCK].scale, largest), "the clips are not those of the range"
    with rebuilt(run, [BLOCK], 4):
        torch.testing.assert_close(codes(run)[BLOCK].scale, largest / 7)


# --- wrong input, before long work ------------------------------------------------------------------------------------


def test_wrong_input(folder):
    with pytest.raises(ConfigError, match="nothing is planned to be quantized; give a preset"):
        quantize(config(folder, preset=None, out="refused-1"))
    with pytest.raises(DataError, match=r"quantization.ptq.examples 5000 exceeds the \d+ training examples; lower it"):
        quantize(config(folder, out="refused-2", weights="lapq", examples=5000))
    with pytest.raises(ConfigError, match="plugin 'ti-g' trains with a teacher, and `qpipe quantize` trains nothing"):
        quantize(config(folder, out="refused-3").model_copy(update={"plugins": {"ti-g": {}}}))


@pytest.mark.parametrize(
    ("rule", "ptq", "method"),
    [
        ({"site": "{block}.*:weight", "quantizer": "dorefa"}, {"weights": "adaround"}, "weights: adaround"),
        ({"site": "{embedding}:weight", "quantizer": "uniform"}, {"weights": "adaround"}, "weights: adaround"),
        ({"site": "{embedding}:weight", "quantizer": "lsq"}, {"bias_correction": True}, "bias_correction"),
        (
            {"site": "{embedding}:weight", "quantizer": "uniform"},
            {"weights": "lapq", "bias_correction": True},
            "bias_correction",
        ),
        ({"site": "{block}.*:weight", "quantizer": "dorefa"}, {"weights": "lapq"}, "weights: lapq"),
    ],
)
def test_methods_that_would_do_nothing(folder, rule, ptq, method):
    """LAPQ sets clips of embeddings too; rounding and biases are those of linear maps and convolutions."""
    made = config(folder, preset=None, out="refused-4", **ptq)
    changes = {"rules": (qpipe.config.RuleConfig.model_validate(rule),)}
    what = "weights" if method == "weights: lapq" else "weights of linear maps and convolutions that no other .*,"
    message = rf"ptq.{method} works on {what} with one of uniform, lsq, lsq\+, uniform-static, and the plan has none"
    with pytest.raises(ConfigError, match=message):
        quantize(made.model_copy(update={"quantization": made.quantization.model_copy(update=changes)}))


def test_a_range_that_no_weight_has(folder):
    with pytest.raises(ConfigError, match="range: percentile is for weights with quantizer `uniform`, and the plan"):
        quantize(config(folder, learned=3, out="refused-6", range="percentile"))
    with pytest.raises(ConfigError, match="give percentile with range: percentile, and only there"):
        config(folder, percentile=99.0)


def test_a_model_without_its_head_is_refused(folder, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(folder / "trained" / "model").save_pretrained(tmp_path / "bare")
    made = config(folder, out="refused-5")
    bare = made.model.model_copy(update={"name": str(tmp_path / "bare"), "tokenizer": made.model.name})
    with pytest.raises(ModelError, match="lacks weights, such as classifier.bias: it was not fine-tuned for this task"):
        quantize(made.model_copy(update={"model": bare}))


# --- as the start of training -----------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ptq",
    [{"weights": "adaround", "bias_correction": True}, {"weights": "lapq"}, {"weights": "lapq", "learned": 3}],
    ids=["adaround", "lapq", "lapq-lsq"],
)
def test_training_starts_from_it_under_zero_3_as_on_one_process(folder, ptq):
    made = config(folder, out="start", **ptq)
    train = made.train.model_copy(update={"learning_rate": 1e-12})
    one = made.model_copy(update={"train": train}).model_dump(mode="json")
    two = {**one, "engine": {**one["engine"], "name": "deepspeed", "zero": 3}}
    name = "-".join(map(str, ptq.values()))
    write_traces({f"{name}-one": one}, 2, str(folder))
    run_distributed("qpipe.testing.gradients:write_traces", cases={f"{name}-two": two}, steps=2, folder=str(folder))
    first, second = (load_file(folder / f"{name}-{n}.safetensors") for n in ("one", "two"))
    compare(first, second)
    found = [key for key in first if key.startswith("codes/")]
    assert found and all(torch.equal(first[key], second[key]) for key in found)
    assert any(key.startswith("gradient/") for key in first)


@pytest.mark.parametrize("quantizer", ["uniform", "lsq"])
def test_training_that_starts_from_it_resumes_bit_for_bit(quantizer):
    rules = [{"site": "{block}.*:weight", "quantizer": quantizer, "options": {"bits": 3}}]
    check_rules(rules, zero3=False, quantization__ptq={**QUICK, "weights": "adaround", "iterations": 20})


def test_a_resumed_training_keeps_the_report(folder):
    """It does not initialise again, and `results.json` still says how that went."""
    made = config(folder, out="resumed", weights="lapq")
    made = made.model_copy(update={"train": made.train.model_copy(update={"max_steps": 4, "save_every": 2})})
    whole = execute(made).results["ptq"]
    shutil.rmtree(Path(made.out) / "checkpoints" / "step-00000004")
    run = execute(made, resume=True)
    assert run.results["resumed_step"] == 2
    assert json.loads((run.out / "results.json").read_text())["ptq"] == json.loads(json.dumps(whole))


# --- a plugin's quantizer ---------------------------------------------------------------------------------------------


class FixedGrid(qpipe.SettableGrid):
    """A scale for each row, from public names alone."""

    def __init__(self, options):
        super().__init__(options, 3)
        self.row_wise = False
        self.low, self.high = -3, 3

    def kernel(self):
        return FixedKernel(self.low, self.high, self.context.scale_dtype, self.context.rescale)

    def state(self):
        return (self.scale,)

    def initialize(self, value):
        self.register_buffer("scale", self.search(value, method="min-max")[0])

    def grid_in_use(self):
        return self.scale, torch.zeros_like(self.scale)

    def search(self, value, **changes):
        scale, _ = qpipe.search_grid(
            self.rows_of(value), self.axes, self.low, self.high, symmetric=True, snap=self.snap, **changes
        )
        return scale, torch.zeros_like(scale)

    def set_grid(self, scale, zero_point, value):
        self.scale.copy_(scale)
        self.changed()


class FixedKernel(qpipe.GridKernel):
    def grid(self, rows, axes, *state):
        return qpipe.Grid(self.snap(state[0]), 0.0)


class FixedPlugin(qpipe.Plugin):
    @qpipe.hookimpl
    def qpipe_quantizers(self):
        yield qpipe.QuantizerKind("fixed-grid", FixedGrid, qpipe.GridOptions, frozenset({"weight"}))


@pytest.mark.parametrize("method", ["lapq", "adaround"])
def test_what_data_sets_works_on_the_grids_of_plugins(folder, method):
    """The loss falls in LAPQ's joint search, and every layer's error by AdaRound's rounding."""
    made = config(folder, out=f"fixed-{method}", weights=method)
    rule = {"site": "{block}.*:weight", "quantizer": "fixed-grid"}
    rules = (qpipe.config.RuleConfig.model_validate(rule),)
    quantization = made.quantization.model_copy(update={"rules": rules, "preset": None})
    plugins = load_plugins({}, extra=[("fixed", FixedPlugin())])
    run = _prepared(made.model_copy(update={"quantization": quantization}), plugins)
    initialize(run)
    quantizers = [q for q in run.instruments.quantizers().values() if isinstance(q, FixedGrid)]
    assert len(quantizers) == 12, "six in each of two blocks"
    report = run.results["ptq"]
    if method == "lapq":
        assert report["lapq"]["loss"] < report["lapq"]["start_loss"]
        return
    assert all(layer["after"] < layer["before"] for layer in report["layers"].values())
    for path, quantizer in ((site.removesuffix(":weight"), q) for site, q in run.instruments.quantizers().items()):
        weight = run.student.get_parameter(f"{path}.weight")
        assert torch.equal(quantizer(weight), weight), path


def test_a_batch_of_training_that_the_data_do_not_fill_is_refused_first(folder, monkeypatch):
    """The check before calibration takes one, after AdaRound and LAPQ have run for long."""
    monkeypatch.setattr(
        importlib.import_module("qpipe.stages.quantize"), "_set_up", lambda run: pytest.fail("work had begun")
    )
    given = config(folder, out="too-large", weights="adaround", examples=16)
    train = given.train.model_copy(update={"batch_size": 5000})
    with pytest.raises(ConfigError, match="train.batch_size 5000 exceeds the .* training examples"):
        quantize(given.model_copy(update={"train": train}))


class Repeated(Plugin):
    """ALBERT, whose one block runs as often as it has layers."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        shape = hf.AlbertConfig(vocab_size=len(VOCABULARY), embedding_size=16, num_labels=num_labels, **sizes)
        return hf.AlbertForSequenceClassification(shape)


def test_layers_that_run_several_times_are_not_fitted_to_one_of_their_inputs(folder):
    run = _prepared(config(folder, bias_correction=True), load_plugins({}, extra=[("repeated", Repeated())]))
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    with pytest.raises(ConfigError, match="every layer runs several times in a forward pass"):
        initialize(run)
    assert all(torch.equal(p, before[name]) for name, p in run.student.named_parameters())


def test_a_model_whose_labels_are_in_another_order_is_refused(folder, tmp_path):
    """Its metrics would be those of other classes, and the export would name them wrongly."""
    turned = tmp_path / "turned"
    shutil.copytree(folder / "trained" / "model", turned)
    about = json.loads((turned / "config.json").read_text())
    names = [about["id2label"][key] for key in sorted(about["id2label"])]
    assert names == ["negative", "positive"]
    about |= {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    (turned / "config.json").write_text(json.dumps(about))
    given = config(folder, out="turned")
    given = given.model_copy(update={"model": given.model.model_copy(update={"name": str(turned)})})
    with pytest.raises(ModelError, match=r"same in another order; set data.labels: \[positive, negative\]"):
        quantize(given)


def test_options_of_adaround_reach_it(folder, monkeypatch):
    stage = importlib.import_module("qpipe.stages.initialize")
    seen, real = set(), stage.learn_rounding

    def learn(rounding, *given, **options):
        seen.add((rounding.margin, options["decay"], options["decay_shape"]))
        return real(rounding, *given, **options)

    monkeypatch.setattr(stage, "learn_rounding", learn)
    run, _ = prepared(folder, weights="adaround", iterations=1, relaxation="sigmoid", decay="power", decay_shape=3.0)
    initialize(run)
    assert seen == {(0.0, "power", 3.0)}, "a plain sigmoid is not stretched"


@pytest.mark.parametrize("flat", [False, True])
def test_padding_does_not_count_however_tokens_lie(flat):
    """OPT's feed-forward networks get all tokens one after another."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.where(mask.bool()[..., None], 1.0, 99.0).expand(2, 3, 4)
    x = x.reshape(6, 4) if flat else x
    assert float(without_padding(x, mask, "input").max()) == 1
    assert positions_of(torch.nn.Linear(4, 4), x, {"attention_mask": mask}).shape == (3, 4)
    pooled = torch.full((2, 4), 99.0)
    assert without_padding(pooled, mask, "input") is pooled
