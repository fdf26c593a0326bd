"""Distance to the teacher, curvature and landscape of a run, against values computed in another way."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from qpipe import ConfigError, ModelError, Plugin
from qpipe.analysis import curvature
from qpipe.analysis import heads as heads_module
from qpipe.analysis import layers as layers_module
from qpipe.analysis import session as session_module
from qpipe.analysis.analyze import Request, analyze, analyze_runs, measure
from qpipe.analysis.curvature import trained_parameters, validation_batches
from qpipe.analysis.hessian import hessian_product, norms, top_eigenvalues
from qpipe.analysis.landscape import moved, normalized, offsets, random_direction
from qpipe.analysis.ledger import Ledger
from qpipe.analysis.observe import examples
from qpipe.analysis.session import Session, Source
from qpipe.analysis.slopes import frozen, twice_differentiable
from qpipe.analysis.teacher import reference_model
from qpipe.analysis.weights import Weights
from qpipe.config import resolve
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.grid import GridQuantizer
from qpipe.quant.quantizer import Quantizer, straight_through
from qpipe.quant.tensor import QTensor
from qpipe.report.convergence import convergence, rise, summary_rows
from qpipe.run import Step
from qpipe.stages.calibrate import inputs_of
from qpipe.stages.sensitivity import load, mean_loss, sample
from qpipe.stages.train import task_loss
from qpipe.testing import tiny_model


@pytest.fixture(scope="module")
def run(finished):
    return load(finished.out)


@pytest.fixture
def here(run, tmp_path):
    """The run with another directory, so that nothing measured before is found."""
    before = run.config
    run.config = before.model_copy(update={"out": str(tmp_path / "run")})
    yield run
    run.config = before


@pytest.fixture
def teacher(finished):
    return str(finished.out.parent / "teacher")


def plain(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def test_layer_errors_are_those_of_the_plain_models(here, finished, teacher):
    here.instruments.context.enabled = False
    found = analyze(here, Request(("layers",), examples=3, teacher=teacher))["layers"]
    here.instruments.context.enabled = True
    models = plain(finished.out / "model"), plain(teacher)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    # Attention outputs before and after residual and LayerNorm: figure 4b of Kim et al. has those after.
    places = {"attention_output": "dense", "ffn_input": "LayerNorm"}
    seen = {(kind, side, layer): [] for kind in places for side in (0, 1) for layer in (0, 1)}
    for (kind, side, layer), values in seen.items():
        module = models[side].bert.encoder.layer[layer].attention.output.get_submodule(places[kind])
        module.register_forward_hook(lambda m, i, out, values=values: values.append(out[0]))
    with torch.no_grad():
        for index in range(3):
            batch = inputs_of(here.data.collate([here.data.validation[index]]))
            kept = batch["attention_mask"][0].bool()
            ours, theirs = (m(**batch, output_hidden_states=True).hidden_states for m in models)
            for layer in range(3):
                squares[layer] += (ours[layer][0, kept] - theirs[layer][0, kept]).double().square().sum()
            for values in seen.values():
                values[-1] = values[-1][kept]
            count += int(kept.sum()) * 32
    assert found["hidden_states"]["mse"] == pytest.approx((squares / count).tolist(), rel=1e-3)
    for kind in places:
        joined = {key[1:]: torch.cat(values).double() for key, values in seen.items() if key[0] == kind}
        expected = [float((joined[0, layer] - joined[1, layer]).square().mean()) for layer in (0, 1)]
        assert found[kind]["mse"] == pytest.approx(expected, rel=1e-3), kind
        powers = [float(joined[1, layer].square().mean()) for layer in (0, 1)]
        assert found[kind]["power"] == pytest.approx(powers, rel=1e-3), kind
    assert found["layers"] == [1, 2] and found["states"] == [0, 1, 2]


def test_a_model_is_no_distance_from_itself(here, finished):
    own = str(finished.out / "model")
    request = Request(("layers", "ranking"), examples=2, sequences=2, teacher=own)
    quantized = analyze(here, request)
    assert quantized["layers"]["hidden_states"]["mse"][-1] > 0
    here.instruments.context.enabled = False
    found = analyze(here, request, again=True)
    here.instruments.context.enabled = True
    assert max(found["layers"]["hidden_states"]["mse"] + found["layers"]["attention_output"]["mse"]) < 1e-10
    assert max(max(layer) for layer in found["ranking"]["loss"]) < 1e-6
    assert torch.tensor(found["ranking"]["maps"]).equal(torch.tensor(found["ranking"]["teacher_maps"]))


def test_maps_of_a_sentence(here, teacher):
    text = "the movie was great"
    found = analyze(here, Request(("ranking",), sequences=1, teacher=teacher, text=text))["ranking"]
    assert found["tokens"] == ["[CLS]", *text.split(), "[SEP]"]
    assert torch.tensor(found["maps"]).shape == (2, 4, 6, 6)
    torch.testing.assert_close(torch.tensor(found["teacher_maps"]).sum(-1), torch.ones(2, 4, 6), atol=4e-4, rtol=0)


class Half(Quantizer):
    """Levels at multiples of 1/2; weights beyond `limit` get no gradient."""

    def __init__(self, limit=torch.inf):
        super().__init__()
        self.limit = limit

    def encode(self, value):
        return QTensor((value * 2).round(), torch.full((1,), 0.5), torch.zeros(1), 8)

    def surrogate(self, value):
        def gradient(rows, grad, out):
            return (torch.mul(grad, rows.abs() < self.limit, out=out), ())[1]

        return GridQuantizer.with_gradient(Rows(), value, gradient)


class Rows:
    """What `with_gradient` needs of a quantizer."""

    def rows_of(self, value):
        return value


def test_curvature_passes_quantizers_with_the_slope_that_training_uses():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=generator)
    weight = torch.randn(1, 5, generator=generator).requires_grad_()
    quantizer = Half(limit=0.8)
    quantizer.surrogate = frozen(quantizer)
    loss = 0.5 * (x @ quantizer(weight).T).square().sum()
    free = (weight.detach().abs() < 0.8).float()
    assert 0 < free.sum() < 5
    expected = torch.linalg.eigvalsh((x * free).T @ (x * free)).sort(descending=True).values[:2]
    found = top_eigenvalues(hessian_product(loss, [weight]), [weight], 2, generator, tolerance=1e-7)
    assert [value.value for value in found] == pytest.approx(expected.tolist(), rel=1e-3)
    assert found[0].residual < 0.02


def test_curvature_passes_static_ranges_where_they_do_not_clip():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(12, 5, generator=generator), torch.randn(1, 5, generator=generator).requires_grad_()
    quantizer = UniformActivation(ActivationOptions(dynamic=False, granularity="tensor"))
    quantizer.low.fill_(-1)
    quantizer.high.fill_(1)
    quantizer.freeze_range()
    value = x @ weight.T
    inside = x[(value.detach().abs() < 1).flatten()]
    assert 0 < len(inside) < 12
    loss = 0.5 * quantizer(value).square().sum()
    found = top_eigenvalues(hessian_product(loss, [weight]), [weight], 1, generator, tolerance=1e-7)
    assert found[0].value == pytest.approx(float(torch.linalg.eigvalsh(inside.T @ inside)[-1]), rel=1e-3)


def test_gradients_that_mix_elements_are_refused():
    quantizer = Half()
    quantizer.site = "here:weight"
    quantizer.surrogate = lambda value: straight_through(value / value.abs().max(), value)
    with pytest.raises(ConfigError, match="here:weight: the gradient of Half goes from one element to others"):
        frozen(quantizer)(torch.randn(3, 4))


def test_products_are_differences_of_gradients(here):
    """The whole model, fused attention included; without quantizers, whose values jump."""
    here.instruments.context.enabled = False
    with twice_differentiable(here):
        batch = validation_batches(here, 4)[0]
        parameters = trained_parameters(here)
        vector = random_direction(parameters, "rows", torch.Generator().manual_seed(0))

        def loss():
            return task_loss(here).fn(Step(0, False, batch, here.student(**inputs_of(batch))))

        product = hessian_product(loss(), list(parameters.values()))(list(vector.values()))
        sides = []
        for by in (1e-2, -1e-2):
            with moved(parameters, [vector], [by]):
                sides.append(torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True))
    here.instruments.context.enabled = True
    pairs = [(p, (a - b) / 2e-2) for p, a, b in zip(product, *sides, strict=True) if a is not None]
    ours, theirs = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_norms_of_zeros_have_no_curvature():
    weights = [torch.zeros(3, requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)]
    product = hessian_product(norms(weights), weights)
    first, second = product([torch.ones(3), torch.tensor([4.0, -3.0])])
    assert torch.equal(first, torch.zeros(3))
    torch.testing.assert_close(second, torch.tensor([0.8, -0.6]))


def test_an_interrupted_hessian_goes_on(here, monkeypatch):
    train = here.config.train.model_copy(update={"eval_batch_size": 8})
    here.config = here.config.model_copy(update={"train": train})
    request, real, calls = Request(("hessian",), examples=16, eigenvalues=1), curvature._eigenvalues, []

    def interrupted(run, batch, request, number):
        calls.append(number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return real(run, batch, request, number)

    monkeypatch.setattr(curvature, "_eigenvalues", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(here, request)
    found = analyze(here, request)["hessian"]
    assert calls == [0, 1, 1]
    assert [len(batch) for batch in found["batches"]] == [1, 1]
    assert {path.name for path in (here.out / "analysis").iterdir()} == {"hessian.json"}


@pytest.mark.parametrize(
    ("part", "module", "name"), [("layers", layers_module, "_outputs"), ("ranking", heads_module, "ranking_loss")]
)
def test_interrupted_distances_to_the_teacher_go_on(part, module, name, here, teacher, monkeypatch):
    """Errors of layers after every so many examples (here 2 of 4, of two models), ranking losses after every layer."""
    monkeypatch.setattr(layers_module, "KEPT_EVERY", 2)
    request, real, calls = Request((part,), examples=4, sequences=4, teacher=teacher), getattr(module, name), []
    whole = analyze(here, request)[part]
    shutil.rmtree(here.out / "analysis")
    monkeypatch.setattr(module, name, lambda *words: interrupted(calls) or real(*words))
    with pytest.raises(KeyboardInterrupt):
        analyze(here, request)
    assert {path.name for path in (here.out / "analysis").iterdir()} == {f".{part}.partial.json"}
    assert analyze(here, request)[part] == whole
    assert len(calls) == 5 + 4, "of eight, four were there"
    assert {path.name for path in (here.out / "analysis").iterdir()} == {f"{part}.json"}


def test_landscape_meets_the_model_and_leaves_it_alone(here):
    before = {name: p.detach().clone() for name, p in here.student.named_parameters()}
    found = analyze(here, Request(("landscape",), examples=16, points=3))["landscape"]
    assert all(torch.equal(before[name], p) for name, p in here.student.named_parameters())
    batches, loss = sample(here, 16), task_loss(here)
    assert found["losses"][1][1] == pytest.approx(mean_loss(here, batches, loss), rel=1e-6)
    parameters, generator = trained_parameters(here), torch.Generator().manual_seed(here.config.seed)
    first, second = (random_direction(parameters, "rows", generator) for _ in range(2))
    for name, p in parameters.items():
        p.data += first[name] - second[name]
    here.instruments.context.weights_changed()
    assert found["losses"][2][0] == pytest.approx(mean_loss(here, batches, loss), rel=1e-5)
    for name, p in parameters.items():
        p.data.copy_(before[name])
    here.instruments.context.weights_changed()


def test_directions_are_as_long_as_the_weights_and_offsets_meet_0():
    generator = torch.Generator().manual_seed(0)
    weight, drawn = (torch.randn(4, 3, 2, generator=generator) for _ in range(2))
    rows = normalized(drawn, weight, "rows").flatten(1).norm(dim=1)
    torch.testing.assert_close(rows, weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(normalized(drawn, weight, "columns").norm(dim=0), weight.norm(dim=0))
    assert offsets(5) == [-1, -0.5, 0, 0.5, 1]


def test_directions_along_columns_leave_positions_alone(here):
    """As Park and Kim's code does, by name; along rows, as in Li et al., they move like all others."""
    parameters = trained_parameters(here) | {
        f"{name}.weight": nn.Parameter(torch.ones(3, 2)) for name in ("pos_embed", "b.relative_position_bias_table")
    }
    columns = random_direction(parameters, "columns", torch.Generator().manual_seed(0))
    rows = random_direction(parameters, "rows", torch.Generator().manual_seed(0))
    positions = {
        "bert.embeddings.position_embeddings.weight",
        "pos_embed.weight",
        "b.relative_position_bias_table.weight",
    }
    assert {name for name, d in columns.items() if parameters[name].ndim > 1 and not d.any()} == positions
    assert all(rows[name].any() for name in positions)
    generator = torch.Generator().manual_seed(0)
    for name, weight in parameters.items():  # what is drawn for a weight does not depend on those left alone
        drawn = torch.randn(weight.shape, generator=generator)
        if name not in positions:
            assert torch.equal(columns[name], normalized(drawn, weight.detach(), "columns"))


def test_an_interrupted_landscape_goes_on_with_the_same_weights_only(here, monkeypatch):
    request, real, calls = Request(("landscape",), examples=8, points=3), curvature.mean_loss, []
    whole = analyze(here, request)["landscape"]["losses"]
    shutil.rmtree(here.out / "analysis")
    monkeypatch.setattr(curvature, "mean_loss", lambda *words: interrupted(calls) or real(*words))
    with pytest.raises(KeyboardInterrupt):
        analyze(here, request)
    assert len(calls) == 5
    shown = []
    found = analyze(here, request, track=lambda items, what: shown.append((what, len(items))) or items)
    assert found["landscape"]["losses"] == whole and len(calls) == 5 + 5, "four points of nine were there"
    assert shown == [("landscape, points", 9)]
    assert {path.name for path in (here.out / "analysis").iterdir()} == {"landscape.json"}
    calls.clear()
    shutil.rmtree(here.out / "analysis")
    with pytest.raises(KeyboardInterrupt):
        analyze(here, request)
    bias = here.student.get_parameter("bert.encoder.layer.0.output.dense.bias")
    before = bias.detach().clone()
    bias.data += 1
    analyze(here, request)
    bias.data.copy_(before)
    assert len(calls) == 5 + 9, "losses of other weights are not gone on with"


def interrupted(calls):
    """Note a call; the fifth is interrupted."""
    calls.append(1)
    if len(calls) == 5:
        raise KeyboardInterrupt


def test_outliers_and_ranges_look_once(here, monkeypatch):
    passes, real = [], session_module.collect
    monkeypatch.setattr(session_module, "collect", lambda *words: passes.append(1) or real(*words))
    analyze(here, Request(("ranges",), sequences=2))
    alone = len(passes)
    shutil.rmtree(here.out / "analysis")
    analyze(here, Request(("outliers", "ranges"), sequences=2))
    assert alone > 0 and len(passes) == 2 * alone


def test_what_does_not_fit_is_named(here, finished, teacher, tmp_path):
    with pytest.raises(ConfigError, match="was trained without a teacher; name the full-precision model"):
        analyze(here, Request(("layers",)))
    with pytest.raises(ConfigError, match="an odd number of points"):
        Request(("landscape",), points=4)
    deep = tiny_model(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(ModelError, match="2 blocks and its teacher 3"):
        analyze(here, Request(("layers",), examples=1, teacher=str(deep)))
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match="compare models of one width"):
        analyze(here, Request(("layers",), examples=1, teacher=str(wide)))
    with pytest.raises(ModelError, match="say which of the teacher's layers to compare with: --layer-map"):
        analyze(here, Request(("layers",), examples=1, teacher=str(deep)))


class Mapped(Plugin):
    """Learns from a teacher by a map of layers."""

    def __init__(self, layer_map):
        super().__init__()
        self.layer_map = layer_map


@pytest.mark.parametrize(
    ("depth", "kept", "learned", "given", "states"),
    [
        (4, None, [], None, [0, 2, 4]),
        (4, None, [[1, 2]], None, [0, 1, 2]),
        (5, None, [[2, 4], None], None, [0, 2, 4]),
        (5, None, [[1, 3, 5], [1, 3, 5]], None, [1, 3, 5]),
        (4, None, [[1, 2]], (3, 4), [0, 3, 4]),
        (4, None, [[1, 2]], (1, 2, 4), [1, 2, 4]),
        (4, [0, 3], [], None, [0, 1, 4]),
        (5, "every-other", [], None, [0, 2, 4]),
        (4, [0, 3], [[1, 2]], None, [0, 1, 2]),
        (4, [0, 4], [[1, 5], [1, 2, 3, 4]], None, [0, 2, 4]),
        (2, [0, 4], [[1, 5]], None, [0, 1, 2]),
    ],
)
def test_layers_are_compared_as_the_run_maps_them(depth, kept, learned, given, states, here, tmp_path, monkeypatch):
    """As asked; one by one if depths are equal; as plugins learned; as layers were kept; evenly: the first to fit."""
    deep = str(tiny_model(tmp_path / "deep", num_hidden_layers=depth))
    here.config = here.config.model_copy(update={"model": here.config.model.model_copy(update={"keep_layers": kept})})
    monkeypatch.setattr(here.host, "plugins", {str(number): Mapped(own) for number, own in enumerate(learned)})
    told = []
    found = analyze(here, Request(("layers",), examples=2, teacher=deep, layer_map=given), told=told.append)["layers"]
    assert found["states"] == states and found["layers"] == states[1:]
    assert any("compared with" in line for line in told) == (depth != 2)
    teacher, batches = plain(deep), [e.batch for e in examples(here, 2)]
    with torch.no_grad():
        theirs = [teacher(**batch, output_hidden_states=True).hidden_states for batch in batches]
    powers = [torch.cat([one[state].flatten() for one in theirs]).square().mean() for state in states]
    assert found["hidden_states"]["power"] == pytest.approx([float(power) for power in powers], rel=1e-4)


def test_layer_maps_that_do_not_fit_are_refused(here, tmp_path, monkeypatch):
    deep = str(tiny_model(tmp_path / "deep", num_hidden_layers=4))
    for given in ((1,), (2, 5), (0, 2), (1, 2, 3, 4)):
        with pytest.raises(ConfigError, match=r"--layer-map .* must have 2 rising numbers from 1 to the teacher's 4"):
            analyze(here, Request(("layers",), examples=1, teacher=deep, layer_map=given))
    with pytest.raises(ConfigError, match="--layer-map 2,2 must rise"):
        Request(("ranking",), layer_map=(2, 2))
    with pytest.raises(ConfigError, match="--layer-map is for layers and ranking"):
        Request(("noise",), layer_map=(2, 4))
    monkeypatch.setattr(here.host, "plugins", {"a": Mapped([1, 2]), "b": Mapped([2, 4])})
    with pytest.raises(ConfigError, match="plugins a and b map layers in two ways; say which with --layer-map"):
        analyze(here, Request(("layers",), examples=1, teacher=deep))


def test_heads_are_compared_as_the_run_maps_them(here, tmp_path):
    deep = str(tiny_model(tmp_path / "deep", num_hidden_layers=4))
    requests = {given: Request(("ranking",), sequences=1, teacher=deep, layer_map=given) for given in ((1, 2), (2, 4))}
    maps = {given: analyze(here, request)["ranking"]["teacher_maps"] for given, request in requests.items()}
    assert maps[1, 2][1] == maps[2, 4][0] and maps[1, 2][0] != maps[2, 4][0]


def test_several_processes_are_refused(here, monkeypatch):
    monkeypatch.setattr(here.engine, "world_size", 2)
    with pytest.raises(ConfigError, match="work of one process, and there are 2"):
        analyze(here, Request(("hessian",)))


def test_curves_need_no_model(finished, tmp_path):
    shutil.copy(finished.out / "metrics.jsonl", tmp_path)
    found = measure(Session(Source(tmp_path, lambda: pytest.fail("loaded")), Request(("curves",))))["curves"]
    assert [step for step, _ in found["training"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["evaluation"]["accuracy"] == [[6, finished.results["evaluation"]["accuracy"]]]
    with pytest.raises(ConfigError, match="no curve"):
        measure(Session(Source(tmp_path / "none", lambda: pytest.fail("loaded")), Request(("curves",))))


def test_a_ledger_drops_what_was_measured_with_other_settings(tmp_path):
    ledger = Ledger(tmp_path / "a" / "part.json", {"points": 3})
    ledger.put("0", 1.5)
    assert "0" in Ledger(tmp_path / "a" / "part.json", {"points": 3})
    assert "0" not in Ledger(tmp_path / "a" / "part.json", {"points": 5})
    ledger.close()
    assert not (tmp_path / "a" / "part.json").exists()


def test_numbers_of_a_landscape_and_a_hessian():
    landscape = {"losses": [[1.0, 2.0, 3.0], [2.0, 0.5, 2.0], [3.0, 2.0, 1.0]]}
    assert rise(landscape) == pytest.approx(16 / 8 - 0.5)
    assert rise({"losses": [[None, 2.0, 3.0], [2.0, 0.5, 2.0], [3.0, 2.0, 1.0]]}) is None
    hessian = {"batches": [[{"value": -3.0}], [{"value": 1.0}]]}
    columns, rows = summary_rows({"a": {"hessian": hessian}, "b": {}})
    assert columns == ["largest |eigenvalue|"] and rows == [["a", 2.0], ["b", None]]


def test_runs_are_shown_together(here, finished, teacher, tmp_path):
    parts = ("layers", "ranking", "hessian", "landscape", "curves")
    request = Request(parts, examples=4, sequences=1, points=3, eigenvalues=1, teacher=teacher)
    first, second = here.out, tmp_path / "other"
    for out in (first, second):
        out.mkdir(exist_ok=True)
        shutil.copy(finished.out / "metrics.jsonl", out)
    analyze_runs([Source(out, lambda: here) for out in (first, second)], request)
    html = convergence(first)
    assert html.count("<svg") == 6
    assert all(name in html for name in ("other", "Distance to the teacher", "Order within", "Curvature", "landscape"))
    assert "Not shown" not in html
    (second / "analysis" / "hessian.json").unlink()
    noted = json.loads((second / "analysis" / "layers.json").read_text())
    noted["settings"]["examples"] = 5
    (second / "analysis" / "layers.json").write_text(json.dumps(noted))
    assert "layers of other, hessian of other" in convergence(first)
    noted = json.loads((second / "analysis" / "ranking.json").read_text())
    noted["models"]["teacher"]["digest"] = "another"
    (second / "analysis" / "ranking.json").write_text(json.dumps(noted))
    assert "ranking of other, whose teacher is another" in convergence(first)
    noted["models"]["teacher"]["digest"] = json.loads((first / "analysis" / "ranking.json").read_text())["models"][
        "teacher"
    ]["digest"]
    (second / "analysis" / "ranking.json").write_text(json.dumps({**noted, "teacher_layers": [1, 3]}))
    assert "ranking of other, whose heads or layers of the teacher are others" in convergence(first)
    assert convergence(tmp_path) is None


def test_the_report_says_which_layers_were_compared(tmp_path):
    """Also of a result of an older version, which had no inputs of feed-forward networks."""
    kinds = {"hidden_states": [0.1, 0.2, 0.3], "attention_output": [0.1, 0.2]}
    layers = {"settings": {}, "examples": 2, **{kind: {"mse": mse, "power": mse} for kind, mse in kinds.items()}}
    path = tmp_path / "analysis" / "layers.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**layers, "layers": [1, 2]}))
    assert "are compared with" not in convergence(tmp_path)
    path.write_text(json.dumps({**layers, "ffn_input": layers["attention_output"], "layers": [2, 4]}))
    said = f"Layers of {tmp_path.name} are compared with the teacher&#39;s 2, 4."
    assert said in convergence(tmp_path).replace("'", "&#39;")


def test_layers_of_other_shapes_count_their_own_elements():
    """As those of the stages of a ResNet: an error of 1 everywhere is one of 1 in every layer."""
    shapes = [(1, 4, 8, 8), (1, 8, 4, 4), (1, 16, 2, 2)]
    teacher = [torch.full(shape, 2.0) for shape in shapes]
    found = layers_module.Distances()
    for _ in range(3):
        found.add([value + 1 for value in teacher], teacher)
    assert found.means() == {"mse": [1.0] * 3, "power": [4.0] * 3}


def test_examples_are_read_one_by_one(here, teacher, monkeypatch):
    """A whole validation split of images would not fit beside the models."""
    at_once, real = [], layers_module.example_of
    monkeypatch.setattr(layers_module, "example_of", lambda *words: at_once.append("read") or real(*words))
    outputs = layers_module._outputs
    monkeypatch.setattr(layers_module, "_outputs", lambda *words: at_once.append("ran") or outputs(*words))
    assert analyze(here, Request(("layers",), examples=3, teacher=teacher))["layers"]["examples"] == 3
    assert at_once == ["read", "ran", "ran"] * 3


def test_the_model_before_quantization_is_that_of_its_revision_and_configuration(tmp_path):
    model = {"name": "hub/model", "revision": "v1", "config": {"num_labels": 2}, "keep_layers": [0]}
    config = resolve({"model": model, "task": "sst2", "data": {"train": "t"}, "out": str(tmp_path)})
    found = reference_model(tmp_path, config, False, None)
    assert (found.name, found.revision, found.config, found.keep_layers) == ("hub/model", "v1", {"num_labels": 2}, None)
    assert reference_model(tmp_path, config, False, "other").revision is None


def test_results_outlive_a_teacher_that_was_named_by_a_relative_path(here, teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / "runs" / "teacher")
    monkeypatch.chdir(tmp_path)
    where = {"student": str(tmp_path / "runs" / "teacher"), "teacher": "runs/teacher"}
    weights = Weights(where.__getitem__, lambda role: here.student)
    before = weights.mark("teacher")
    shutil.rmtree(tmp_path / "runs")
    later = Weights(where.__getitem__, lambda role: pytest.fail("loaded"))
    assert later.matching("teacher", before) == before


def test_quantizers_come_back_as_they_were(here):
    before = {name: type(q).surrogate for name, q in here.instruments.quantizers().items()}
    context = here.instruments.context
    context.compiled = True
    with twice_differentiable(here):
        assert not context.compiled, "compiled gradients would be constants to a second derivative"
    assert context.compiled
    context.compiled = False
    for name, quantizer in here.instruments.quantizers().items():
        assert "surrogate" not in vars(quantizer) and type(quantizer).surrogate is before[name]
    assert not any(isinstance(module, nn.Linear) and module.training for module in here.student.modules())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_whose_hessian_is_taken(here, monkeypatch, weight):
    """Of the task's mean loss of each batch, with so many times the sum of norms."""
    train = here.config.train.model_copy(update={"eval_batch_size": 4})
    here.config = here.config.model_copy(update={"train": train})
    seen, real = [], curvature.hessian_product
    monkeypatch.setattr(
        curvature, "hessian_product", lambda loss, p: seen.append(float(loss.detach())) or real(loss, p)
    )
    analyze(here, Request(("hessian",), examples=8, eigenvalues=1, norm_weight=weight))
    expected = []
    with torch.no_grad():
        for batch in curvature.validation_batches(here, 8):
            logits = here.student(**{name: value for name, value in batch.items() if name != "labels"}).logits
            norm = sum(float(p.norm()) for p in curvature.trained_parameters(here).values())
            expected.append(float(torch.nn.functional.cross_entropy(logits, batch["labels"])) + weight * norm)
    assert len(set(expected)) == 2 and seen == pytest.approx(expected, rel=1e-4)
