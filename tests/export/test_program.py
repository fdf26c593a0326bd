"""Programs beside native checkpoints: written, verified in a process without qpipe, and what is refused."""

import json
import shutil
from dataclasses import replace

import export_builders as builders
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qpipe
from qpipe import ActivationRange, FormatError, Program, plain_model, quantize_activations, write_program
from qpipe.export.folder import PROGRAM, PROGRAM_LAYOUT, REFERENCE, write_json, write_sums
from qpipe.export.record import ActivationSite
from qpipe.export.verify import verify, verify_all

pytestmark = pytest.mark.xdist_group("program")  # the fixture takes most of the time

GRIDS = [
    {"bits": 8},
    {"bits": 4, "granularity": "group", "group_size": 16},
    {"bits": 3, "symmetric": False},
    {"bits": 2, "granularity": "tensor"},
]
STATIC = ActivationRange(8, False, "tensor", False, 0.03125, -7.0)


def make_record():
    names = [*builders.linears(builders.make("bert")), "bert.embeddings.word_embeddings"]
    weights = {n: builders.make("bert").get_submodule(n).weight.detach() for n in names}
    tensors = {n: builders.quantize(w, **GRIDS[i % len(GRIDS)]) for i, (n, w) in enumerate(weights.items())}
    site = ActivationSite("bert.encoder.layer.0.intermediate.dense", "input", STATIC)
    return builders.record_of("bert", tensors, activations=[site])


def program_of(record):
    activations = [site.record() for site in record.activations]
    network = plain_model(record)
    quantize_activations(network, activations)
    return Program(network, {name: w.tensor for name, w in record.weights.items()}, activations)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    record, folder = make_record(), tmp_path_factory.mktemp("program") / "export"
    write_program(record, folder, program_of(record))
    return record, folder


def changed(source, target, change):
    """A copy that somebody has changed, checksums included."""
    shutil.copytree(source, target)
    change(target)
    write_sums(target)
    return target


def other_hash(folder):
    layout = json.loads((folder / PROGRAM_LAYOUT).read_text())
    layout["weights"]["bert.pooler.dense.weight"]["sha256"] = "0" * 64
    write_json(folder / PROGRAM_LAYOUT, layout)


def other_logits(folder):
    tensors = load_file(folder / REFERENCE)
    save_file({**tensors, "logits": tensors["logits"] + 1}, folder / REFERENCE)


def test_a_program_runs_without_qpipe_and_changes_are_found(written, tmp_path):
    _, folder = written
    copies = [changed(folder, tmp_path / f.__name__, f) for f in (other_hash, other_logits)]
    good, *bad = verify_all([folder, *copies], check_metric=False, run_program=True)
    found = [next(c for c in result.checks if c.name == "program") for result in (good, *bad)]
    assert [c.status for c in found] == ["pass", "fail", "fail"] and good.passed
    assert "difference exactly 0; 3 reference examples" in found[0].detail
    assert "because sums are formed in another order" in found[0].detail
    assert "1 of " in found[1].detail and "bert.pooler.dense.weight" in found[1].detail
    assert "largest difference 1, allowed" in found[2].detail


def test_a_program_is_not_run_unless_it_is_trusted(written, monkeypatch):
    _, folder = written
    result = verify(folder, check_metric=False)
    (check,) = [c for c in result.checks if c.name == "program"]
    assert result.passed and check.status == "skip" and "qpipe verify --trust-remote-code" in check.detail
    assert {c.name: c.status for c in result.checks if c.name != "metric"} == {
        "files": "pass",
        "weights": "pass",
        "logits": "pass",
        "program": "skip",
    }


def test_weights_are_codes_and_the_card_says_how_to_run_it(written):
    record, folder = written
    program = torch.export.load(folder / PROGRAM)
    layout = json.loads((folder / PROGRAM_LAYOUT).read_text())
    assert layout["weights"].keys() == record.weights.keys()
    assert layout["activations"] == [site.record() for site in record.activations]
    for name, entry in layout["weights"].items():
        codes = program.state_dict[entry["codes"]]
        assert codes.dtype == torch.int8 and torch.equal(codes, record.weights[name].tensor.integers()), name
    text = (folder / "README.md").read_text()
    assert 'torch.export.load("program.pt2")' in text and "program(input_ids=input_ids, attention_mask=" in text
    assert b"/" + __file__.encode().split(b"/")[1] not in (folder / PROGRAM).read_bytes(), "paths of this machine"


def test_other_numbers_of_examples_and_tokens(written):
    record, folder = written
    graph, network = torch.export.load(folder / PROGRAM).module(), program_of(record).network
    names = [k.removeprefix("inputs.") for k in record.reference if k.startswith("inputs.")]
    for shape in ((1, 1), (1, 7), (4, 12)):
        inputs = {name: torch.ones(shape, dtype=torch.long) for name in names}
        with torch.no_grad():
            torch.testing.assert_close(graph(**inputs), network(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_the_rest_is_a_native_checkpoint(written):
    record, folder = written
    assert json.loads((folder / "qpipe.json").read_text())["program"] == PROGRAM
    loaded, plain = qpipe.load_native(folder), plain_model(record)
    assert not plain.training
    for (name, value), (other, expected) in zip(loaded.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, expected)


def test_what_is_refused(tmp_path):
    record = make_record()
    name = "bert.pooler.dense.weight"
    wrong = program_of(record)
    with torch.no_grad():
        wrong.network.get_parameter(name)[0, 0] += 1
    with pytest.raises(FormatError, match=f"{name}: the program's network has other values than its codes decode to"):
        write_program(record, tmp_path / "out", wrong)
    wide = {name: replace(record.weights[name].tensor, bits=9)}
    with pytest.raises(FormatError, match=f"{name}: 9-bit codes do not fit a program, which holds 1 to 8 bits"):
        write_program(record, tmp_path / "out", replace(program_of(record), weights=wide))

    class Decides(nn.Module):
        def forward(self, input_ids, **others):
            return input_ids if input_ids.sum() > 0 else others

    with pytest.raises(FormatError, match="torch.export cannot make a program of this Decides: .*; export to native"):
        write_program(record, tmp_path / "out", Program(Decides(), {}, []))
    assert not (tmp_path / "out").exists()
