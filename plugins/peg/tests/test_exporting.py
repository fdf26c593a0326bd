"""The format `peg-tensors`: the network without groups, from its file."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from qpipe_peg import exporting, proof
from safetensors.torch import load_file
from torch import nn

import qpipe
from qpipe import FixedActivation, FormatError, QTensor
from qpipe.export.native import pack, unpack
from qpipe.export.program import store_codes
from qpipe.export.record import PackedWeight, PlannedSite
from qpipe.export.verify import verify
from qpipe.stages import export_run, plan_run
from qpipe.stages.export import build_record
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config

pytestmark = pytest.mark.xdist_group("exporting")  # the fixture takes most of the time

GROUPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A BERT whose weights and activations all have 8 bits, exported at its end."""
    settings = {"quantization__preset": "w8a8-outputs", "export__format": "peg-tensors", "train__max_steps": 1}
    return qpipe.execute(tiny_config(tmp_path_factory.mktemp("run"), {"peg": {"groups": GROUPS}}, **settings))


@pytest.fixture(scope="module")
def layouts(run):
    """The native layout, and that of the program."""
    return [json.loads((run.out / "export" / f"{name}.json").read_text()) for name in ("quantization", "program")]


def test_a_run_ends_with_a_program_that_was_verified(run):
    assert run.results["verified"]
    checks = {c.name: c for c in verify(run.out / "export").checks}
    assert {name: c.status for name, c in checks.items()} == {
        "files": "pass",
        "weights": "pass",
        "logits": "pass",
        "metric": "pass",
        "program": "skip",
    }


def test_no_activation_has_groups(layouts):
    native, program = layouts
    assert sum(a["granularity"] == "group" for a in native["activations"]) == 6
    assert {a["granularity"] for a in program["activations"]} == {"tensor"}
    parts = [a for a in program["activations"] if "features" in a]
    assert len(parts) == 6 * GROUPS and len(program["activations"]) == len(native["activations"]) - 6 + len(parts)
    for site in (a for a in native["activations"] if a["granularity"] == "group"):
        found = [a for a in parts if a["module"].startswith(f"{site['module']}.quantizers")]
        found = [a for a in found if a["scale"] in site["scale"]]
        assert [f for a in found for f in a["features"]] == site["order"]
        assert [a["scale"] for a in found] == site["scale"]


class Codes:
    """What `FixedActivation` rounds to, call by call."""

    def __init__(self, monkeypatch):
        self.found = []
        plain = FixedActivation.quantize

        def quantize(quantizer, value, out=None):
            self.found.append((quantizer.given, quantizer.encode(value).integers()))
            return plain(quantizer, value, out)

        monkeypatch.setattr(FixedActivation, "quantize", quantize)


class Rounded(torch.fx.Interpreter):
    """Runs a graph and keeps what its quantizers round to, node by node."""

    def run_node(self, node):
        result = super().run_node(node)
        if node.op == "call_function" and node.target == torch.ops.aten.round_.default:
            self.found = [*getattr(self, "found", []), result.clone()]
        return result


def in_float64(graph):
    """The graph with every float32 in it, and in its state, replaced."""
    graph = graph.double()
    for node in graph.graph.nodes:
        wide = torch.fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda a: a if a != torch.float32 else torch.float64
        )
        node.args, node.kwargs = wide
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            node.kwargs = {}
    graph.recompile()
    return graph


def with_exact_weights(folder, layout):
    """The native model in float64, weights decoded in it too."""
    model = qpipe.load_native(folder, "sdpa").double()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, entry in layout["weights"].items():
            tensor = unpack(name, entry, tensors)
            value = (tensor.codes.double() - tensor.zero_point.double()) * tensor.scale.double()
            model.get_parameter(name).copy_(value)
    return model


def test_the_file_computes_the_same_integers(run, layouts, monkeypatch):
    """Every activation of the network, in float64: those with groups by parts, all others as they are."""
    native, folder = layouts[0], run.out / "export"
    inputs = {k.removeprefix("inputs."): v for k, v in load_file(folder / "qpipe_reference.safetensors").items()}
    trained = inputs.pop("logits")
    graph = torch.export.load(folder / "program.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs), trained, rtol=0, atol=1e-2)  # a value may round to another code
    model = with_exact_weights(folder, native)
    qpipe.quantize_activations(model, native["activations"])
    codes, graph = Codes(monkeypatch), in_float64(graph)
    interpreter = Rounded(graph)
    with torch.no_grad():
        logits = model(**inputs).logits
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        (found_logits,) = interpreter.run(*(inputs[name] for name in names), enable_io_processing=False)
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-10)
    rounded = iter(interpreter.found)
    for given, expected in codes.found:
        if given.granularity == "group":
            together = torch.cat([next(rounded) for _ in range(GROUPS)], dim=-1)
            assert torch.equal(together, expected[..., torch.tensor(given.order)].double())
        else:
            assert torch.equal(next(rounded), expected.double()), given
    assert next(rounded, None) is None
    assert len(codes.found) == len(native["activations"]) == 31


def test_another_run_is_exported_to_it_and_a_wrong_network_is_refused(run, tmp_path, monkeypatch):
    record, _ = build_record(restore(run.out))
    plain = proof.rewrite

    def wrong(model, activations):
        rest = plain(model, activations)
        with torch.no_grad():
            model.get_parameter("bert.encoder.layer.1.intermediate.dense.maps.2.weight")[0, 0] += 0.1
        return rest

    monkeypatch.setattr(proof, "rewrite", wrong)
    with pytest.raises(FormatError, match="layer.1.output.dense:output: the rewritten network computes other values"):
        exporting.write(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_tied_to_a_quantized_one_have_its_codes():
    codes = torch.ones(2, 3, dtype=torch.int8)
    tied = {"head.weight": "table.weight", "head.bias": "bias"}
    weights = {"table.weight": SimpleNamespace(tensor=codes), "dense.weight": SimpleNamespace(tensor=codes * 2)}
    found = exporting.all_codes(SimpleNamespace(weights=weights, tied=tied))
    assert found.keys() == {"table.weight", "dense.weight", "head.weight"} and found["head.weight"] is codes


@pytest.mark.parametrize("kind", ["symmetric", "offset", "ternary"])
def test_the_size_of_a_weight_in_both_files(kind):
    codes = torch.randint(-1, 2 if kind == "ternary" else 1, (6, 7), dtype=torch.int8)
    scale, zero = torch.ones(6, 1), torch.full((6, 1), float(kind == "offset"))
    tensor = QTensor(codes, scale, zero, 2 if kind == "ternary" else 3)
    weight = PackedWeight("dense", "Linear", tensor, "")
    native = sum(t.nbytes for t in pack("dense.weight", weight)[1].values())
    program = nn.Module()
    program.dense = nn.Linear(7, 6, bias=False)
    program.dense.weight.data = tensor.decode()
    store_codes(program, "dense.weight", tensor, torch.float32)
    held = sum(t.nbytes for t in program.state_dict().values())
    assert exporting.stored_bytes("dense.weight", weight, torch.float32) == native + held


def planned(folder, options=None, **changes):
    settings = {"quantization__preset": None, "export__format": "peg-tensors", **changes}
    return plan_run(tiny_config(folder, {"peg": {"groups": GROUPS, **(options or {})}}, **settings))


def activation(site, **options):
    return {"site": site, "quantizer": "uniform-activation", "options": options}


@pytest.mark.parametrize(
    ("options", "rules", "message"),
    [
        ({"groups": 1}, [], "no activation has groups of features, so there is nothing to rewrite; use .*native"),
        (
            {"everywhere": True},
            [],
            r"layer.0 has groups at .*query:output.*; what can be rewritten has them at the out",
        ),
        ({"sites": ["{ffn_output}"]}, [], r"layer.1 has groups at bert.encoder.layer.1.output.dense:output; what can"),
        ({"shared": False}, [], r"LayerNorm:output, .*dense:output, .* have orders or numbers of groups of their own"),
        (
            {},
            [activation("{block[0]}.*query:input")],
            "query:input: each token has a range of its own; set granularity",
        ),
    ],
)
def test_plans_that_it_cannot_hold(options, rules, message, tmp_path):
    with pytest.raises(FormatError, match=rf"export.format 'peg-tensors' cannot hold this plan: .*{message}"):
        planned(tmp_path, options, quantization__rules=rules)


def test_weights_that_it_cannot_hold(tmp_path):
    grouped = {"bits": 4, "granularity": "group", "group_size": 8}
    rules = [{"site": "{block[0]}.*key:weight", "quantizer": "uniform", "options": grouped}]
    with pytest.raises(FormatError, match=r"key:weight: a row of a weight has several scales; .* channel or tensor"):
        planned(tmp_path, quantization__rules=rules)
    sites = [PlannedSite("dense", "weight", "Linear", 9)]
    assert "dense:weight: 9-bit codes of weights do not fit" in exporting.check(sites)[0]


def test_groups_without_order_need_not_be_shared(tmp_path):
    assert planned(tmp_path, {"shared": False, "permute": False}).plan.sites
    rule = {"site": "{ffn_sum}", "quantizer": "peg", "options": {"groups": 2}}
    with pytest.raises(FormatError, match="orders or numbers of groups of their own; set shared: true and the same"):
        planned(tmp_path, quantization__rules=[rule])


def test_a_finished_run_that_it_cannot_hold_is_refused_before_it_is_evaluated(tmp_path, monkeypatch):
    settings = {"quantization__preset": None, "export__format": "native", "train__max_steps": 1}
    finished = qpipe.execute(tiny_config(tmp_path, {"peg": {"groups": 1}}, **settings))
    stages = importlib.import_module("qpipe.stages.execute")
    monkeypatch.setattr(stages, "evaluate", lambda run: pytest.fail("evaluated before it was refused"))
    with pytest.raises(FormatError, match="'peg-tensors' cannot hold this plan: no activation has groups"):
        export_run(finished.out, "peg-tensors", tmp_path / "out")
