"""Calibration in a run: estimators, batches, padding, 16 bits, and what is refused before it begins."""

import json

import pytest
import torch

import qpipe
from qpipe import (
    CalibrationPass,
    ConfigError,
    DataError,
    FormatError,
    Options,
    Plugin,
    RangeEstimator,
    RangeEstimatorKind,
    SiteError,
    hookimpl,
)
from qpipe.host import load_plugins
from qpipe.stages.calibrate import calibrate, inputs_of, observed_batches
from qpipe.stages.execute import assemble
from qpipe.stages.trained import restore
from qpipe.stages.variants import switched_off
from qpipe.testing import tiny_config

QUERY, KEY, VALUE = (f"{{block[0]}}.*{name}:input" for name in ("query", "key", "value"))


def rule(site, quantizer="uniform-activation", **options):
    if quantizer == "uniform-activation":
        options = {"dynamic": False, "granularity": "tensor", "symmetric": False, **options}
    return {"site": site, "quantizer": quantizer, "options": options}


WEIGHTS = rule("{block}.*:weight", "uniform", bits=8)


def config(folder, *rules, **changes):
    return tiny_config(folder, quantization__preset=None, quantization__rules=[WEIGHTS, *rules], **changes)


def quantizer_at(run, part):
    (found,) = [q for s, q in run.instruments.quantizers().items() if part in s and not s.endswith(":weight")]
    return found


def calibrated(settings, **more):
    run = assemble(settings, load_plugins(settings.plugins, **more), {})
    calibrate(run)
    return run


def seen_at(run, count, part="query", padding=False):
    """What each batch gives to a linear map of the quantized model, in float64."""
    path = next(s.removesuffix(":input") for s in run.plan.sites if part in s and s.endswith(":input"))
    found = []
    with switched_off(run, [s for s in run.plan.sites if not s.endswith(":weight")]), torch.no_grad():
        for _, batch in observed_batches(run, count):
            mask = torch.ones_like(batch["attention_mask"]) if padding else batch["attention_mask"]
            module = run.student.get_submodule(path)
            keep = module.register_forward_pre_hook(
                lambda m, args, mask=mask: found.append(args[0][mask.bool()].double())
            )
            run.student.eval()(**inputs_of(batch))
            keep.remove()
    return found


@pytest.mark.parametrize("padding", [False, True])
def test_batches_their_size_and_padding_are_options(tmp_path, padding):
    settings = config(
        tmp_path,
        rule(QUERY, range="current"),
        rule(KEY, range="running", range_options={"momentum": 0.6}),
        rule(VALUE),
        quantization__calibration_batches=3,
        quantization__calibration_batch_size=5,
        quantization__calibration_padding=padding,
    )
    run = calibrated(settings)
    batches = seen_at(run, 3, padding=padding)
    sizes = [len(batch["input_ids"]) for _, batch in observed_batches(run, 3)]
    assert sizes == [5, 5, 5] and any(not bool(b["attention_mask"].all()) for _, b in observed_batches(run, 3))
    lows, highs = ([float(getattr(b, end)()) for b in batches] for end in ("min", "max"))

    def running(ends):
        value = ends[0]
        for end in ends[1:]:
            value = 0.6 * value + 0.4 * end
        return value

    expected = {
        "query": (lows[-1], highs[-1]),
        "key": (running(lows), running(highs)),
        "value": (min(lows), max(highs)),
    }
    for part, ends in expected.items():
        found = quantizer_at(run, part)
        assert (float(found.low), float(found.high)) == pytest.approx(ends, rel=1e-5), part
        assert float(found.scale) == pytest.approx((max(ends[1], 0) - min(ends[0], 0)) / 255, rel=1e-5)


def test_batches_larger_than_those_of_evaluation_come_in_parts(tmp_path):
    rules = (rule(QUERY, range="current"), rule(KEY, range="running"), rule(VALUE, range="mse"))
    runs = [calibrated(config(tmp_path, *rules, train__eval_batch_size=size)) for size in (64, 3)]
    for part in ("query", "key", "value"):
        whole, parts = (quantizer_at(run, part) for run in runs)
        assert float(parts.low) == pytest.approx(float(whole.low), rel=1e-4)
        assert float(parts.high) == pytest.approx(float(whole.high), rel=1e-4)


def test_learned_ranges_begin_with_an_estimator(tmp_path):
    settings = config(
        tmp_path,
        rule(QUERY, "affine-activation", bits=4, init="running"),
        rule(KEY, "lsq+-activation", bits=4, init="current"),
        quantization__calibration_batches=2,
    )
    run = calibrated(settings)
    first, second = seen_at(run, 2)
    ends = [0.9 * float(a) + 0.1 * float(b) for a, b in ((first.min(), second.min()), (first.max(), second.max()))]
    assert float(quantizer_at(run, "query").step()) == pytest.approx((ends[1] - ends[0]) / 15, rel=1e-5)
    width = float(second.max() - second.min())
    assert float(quantizer_at(run, "key").step()) == pytest.approx(width / 15, rel=1e-5)


def test_sixteen_bits_are_trained_restored_and_exported(tmp_path, fast):
    rules = (
        rule("{ffn_sum}", bits=16),
        rule("{ffn_output}", "affine-activation", bits=16),
        rule("{logits}", range="mse"),
    )
    run = qpipe.execute(config(tmp_path, *rules, export__format="native"))
    assert run.results["verified"]
    sites = json.loads((run.out / "export" / "quantization.json").read_text())["activations"]
    assert sorted(s["bits"] for s in sites) == [8, 16, 16, 16, 16]
    again = restore(run.out)
    for site, quantizer in run.instruments.quantizers().items():
        for name, value in quantizer.state_dict().items():
            assert torch.equal(again.instruments.quantizers()[site].state_dict()[name], value), (site, name)


def test_formats_that_cannot_hold_sixteen_bits_name_one_that_can(tmp_path):
    with pytest.raises(
        FormatError, match=r"query:input: 16-bit activations do not fit: at most 8; use export.format: native"
    ):
        calibrated(config(tmp_path, rule(QUERY, bits=16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": "mean"}, r"query:input \(configuration\): no range estimator is called 'mean'.*available: min-max"),
        ({"range": "running", "range_options": {"momentum": 1.5}}, "range estimator 'running': momentum = 1.5"),
        ({"range": "mse", "dynamic": True}, "range and range_options are of calibrated ranges"),
    ],
)
def test_wrong_estimators_are_refused_before_anything_long(tmp_path, options, message):
    with pytest.raises(SiteError, match=message):
        calibrated(config(tmp_path, rule(QUERY, **options)))


class OwnPass(Plugin):
    """Looks at calibration data itself."""

    def __init__(self):
        super().__init__()
        self.ranges = None

    @hookimpl
    def qpipe_calibration(self, run):
        def start():
            self.ranges = [bool(q.scale.isfinite().all()) for s, q in run.instruments.quantizers().items()
                           if s.endswith(":input")]  # fmt: skip

        return [CalibrationPass("own", 1, start, lambda: None)]


def test_a_plugins_pass_finds_static_ranges_set(tmp_path):
    own = OwnPass()
    calibrated(config(tmp_path, rule(QUERY)), extra=[("own", own)])
    assert own.ranges == [True]


def test_no_calibration_data(tmp_path):
    with pytest.raises(
        DataError, match="calibration_batch_size is 100000, and there are .* training examples; lower it"
    ):
        calibrated(config(tmp_path, rule(QUERY), quantization__calibration_batch_size=100_000))


def test_no_calibration_batches(tmp_path):
    told = "quantization.calibration_batches: ranges that calibration sets need data: give 1 or more"
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, rule(QUERY), quantization__calibration_batches=0)


def test_fewer_batches_than_asked_for_are_reported(tmp_path, caplog):
    calibrated(config(tmp_path, rule(QUERY), quantization__calibration_batches=1))
    assert "calibration saw" not in caplog.text
    calibrated(config(tmp_path, rule(QUERY), quantization__calibration_batches=10_000))
    assert "and not 10000: there are no more training examples" in caplog.text


class Mean(RangeEstimator):
    """From minus to plus a multiple of the mean magnitude."""

    def __init__(self, options):
        self.factor, self.total, self.count = options.factor, 0.0, 0

    def add(self, x, batch):
        self.total += float(x.abs().double().sum())
        self.count += x.numel()

    def range(self, grid):
        return -self.factor * self.total / self.count, self.factor * self.total / self.count


class MeanOptions(Options):
    factor: float = 2.0


class Means(Plugin):
    @hookimpl
    def qpipe_range_estimators(self):
        yield RangeEstimatorKind("mean", Mean, MeanOptions)


def test_a_plugin_offers_an_estimator(tmp_path):
    rules = (
        rule(QUERY, range="mean", range_options={"factor": 3.0}),
        rule(KEY, "lsq-activation", init="mean"),
    )
    run = calibrated(config(tmp_path, *rules), extra=[("means", Means())])
    mean = float(torch.cat(seen_at(run, 8)).abs().mean())
    assert float(quantizer_at(run, "query").high) == pytest.approx(3 * mean, rel=1e-5)
    assert float(quantizer_at(run, "key").step()) == pytest.approx(2 * mean / 127, rel=1e-5)
