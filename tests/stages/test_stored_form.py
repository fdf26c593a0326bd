"""A quantizer may store its weight in another form (decision 012): who reads the weight, and who the stored form."""

import pytest
import torch
from safetensors.torch import load_file

import qpipe
from qpipe import Plugin, QuantizerKind, SiteError, WeightLoss, hookimpl
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.report.statistics import kurtosis
from qpipe.stages import evaluate_run
from qpipe.stages.export import packed_weights
from qpipe.testing import check_quantizer, tiny_config

SITE = "bert.encoder.layer.0.attention.self.query:weight"
NAME = SITE.replace(":", ".")


class Cubed(UniformWeight):
    """Stores the cube of a weight, and quantizes the weight."""

    def initialize(self, value):
        return value**3

    def master(self, value):
        return value.sign() * value.abs().clamp_min(1e-30) ** (1 / 3)  # the slope at 0 is infinite without

    def encode(self, value):
        return super().encode(self.master(value))

    def quantize(self, value, out=None):
        return super().quantize(self.master(value), out)


class Offer(Plugin):
    def __init__(self, *terms):
        super().__init__()
        self.terms = terms

    @hookimpl
    def qpipe_quantizers(self):
        yield QuantizerKind("cubed", Cubed, UniformOptions, frozenset({"weight"}))

    @hookimpl
    def qpipe_weight_losses(self):
        return self.terms


def config_of(folder, **changes):
    rules = [{"site": SITE, "quantizer": "cubed", "options": {"bits": 3}}]
    changes = {"train__max_steps": 2, "train__learning_rate": 1e-9, **changes}
    return tiny_config(folder, quantization__preset=None, quantization__rules=rules, **changes)


def term(**options):
    return WeightLoss("squares", lambda w: w.square().sum(), 1.0, lambda path: f"{path}:weight" == SITE, **options)


def test_the_quantizer_of_this_test_keeps_the_contract():
    check_quantizer(lambda: Cubed(UniformOptions(bits=3)))
    assert Cubed(UniformOptions()).reparameterizes and not UniformWeight(UniformOptions()).reparameterizes


def test_the_model_folder_has_the_weight_and_a_finished_run_the_stored_form(tmp_path, use, fast):
    use(Offer())
    run = qpipe.execute(config_of(tmp_path))
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "run/model"))
    stored = load_file(tmp_path / "run/model/quantizers.safetensors")[f"{SITE}/stored_weight"]
    assert torch.equal(stored, run.student.get_parameter(NAME))
    torch.testing.assert_close(after[NAME] ** 3, stored, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(stored, before[NAME] ** 3, rtol=0, atol=1e-8)
    assert evaluate_run(run.out) == run.results["evaluation"]


def test_without_quantizers_the_model_computes_with_the_weight(tmp_path, assembled):
    run = assembled(config_of(tmp_path), Offer())
    plain = type(run.student).from_pretrained(tmp_path / "model").eval()
    inputs = {"input_ids": torch.arange(5, 21).view(2, 8)}
    run.instruments.context.enabled = False
    with torch.no_grad():
        found, expected = run.student.eval()(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_those_of_the_weight(tmp_path, assembled):
    run = assembled(config_of(tmp_path), Offer())
    _, (statistics,) = packed_weights(run)
    expected = kurtosis(load_file(tmp_path / "model/model.safetensors")[NAME])
    assert statistics["kurtosis"] == pytest.approx(expected, rel=1e-4)


def test_penalties_on_ordinary_weights_are_refused(tmp_path, assembled):
    with pytest.raises(
        SiteError, match=r"'squares' is meant for ordinary weights, but bert.*query .* that Cubed stores"
    ):
        assembled(config_of(tmp_path), Offer(term()))


def test_penalties_on_the_stored_form_see_it(tmp_path, assembled):
    run = assembled(config_of(tmp_path), Offer(term(stored=True)))
    module = run.student.get_submodule(SITE.removesuffix(":weight"))
    run.instruments.context.due_weight_losses = frozenset({"squares"})
    module(torch.zeros(1, 2, 32))
    (value,) = run.instruments.context.weight_losses.values()
    weight = load_file(tmp_path / "model/model.safetensors")[NAME]
    torch.testing.assert_close(value, (weight**6).sum(), rtol=1e-5, atol=0)
