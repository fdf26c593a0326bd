"""What `qpipe analyze` measures, against values computed by hand or with the plain model."""

import json
import math

import numpy as np
import pytest
import torch

import qpipe
from qpipe import ConfigError, SiteError
from qpipe.analysis import ablation as ablation_module
from qpipe.analysis.ablation import WEIGHTS, ablate
from qpipe.analysis.analyze import Request, analyze
from qpipe.analysis.attention import attention_maps
from qpipe.analysis.groups import grouped, quantized, select
from qpipe.analysis.noise import signal_to_noise
from qpipe.analysis.observe import collect, examples, observing
from qpipe.analysis.outliers import outliers, token_ranges
from qpipe.analysis.session import Session, Source
from qpipe.analysis.suggest import suggest
from qpipe.report.analysis import analysis
from qpipe.stages.sensitivity import load
from qpipe.stages.variants import switched_off
from qpipe.testing import tiny_config

OUTPUT = "bert.encoder.layer.0.output.dense:output"
INPUT = "bert.encoder.layer.0.output.dense:input"


@pytest.fixture(scope="module")
def run(finished):
    return load(finished.out)


def plain(run):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(run.out / "model", attn_implementation="eager").eval()


def test_sites_are_grouped_by_kind_block_and_name():
    sites = ["a.layer.0.b:input", "a.layer.11.b:input", "a.pooler:output"]
    assert grouped(sites, "kind") == {"a.layer.*.b:input": sites[:2], "a.pooler:output": sites[2:]}
    assert grouped(sites, "block") == {"block 0": sites[:1], "block 11": sites[1:2], "outside blocks": sites[2:]}
    assert list(grouped(sites, "site")) == sites
    roles = {"ffn_input": sites[:2], "elsewhere": ["x:output"]}
    assert grouped(sites, "role", roles) == {"ffn_input": sites[:2], "a.pooler:output": sites[2:]}


def test_outliers_name_dimension_and_token():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 30, generator=generator), torch.randn(4, 30, generator=generator)]
    values[0][2, 7], values[1][3, 7], values[1][0, 1] = 40.0, -35.0, 30.0
    tokens = [["[CLS]", "a", "[SEP]", "b", "c"], ["[CLS]", "a", "b", "[SEP]"]]
    found = outliers(values, tokens)
    joined = np.concatenate([v.double().numpy() for v in values])
    assert found["deviation"] == pytest.approx(joined.std(), rel=1e-9)
    expected = np.argwhere(abs(joined - joined.mean()) > 6 * joined.std()).tolist()
    assert expected == [[2, 7], [5, 1], [8, 7]]
    assert found["points"] == expected
    assert found["dimensions"] == [["7", 2, 2], ["1", 1, 1]]
    assert found["tokens"] == [["[SEP]", 2, 2], ["[CLS]", 1, 1]]
    assert found["boundaries"] == [0, 5]
    assert found["share"] == 3 / 270


def test_ranges_of_tokens():
    values = [torch.tensor([[1.0, -2.0], [0.5, 3.0]])]
    assert token_ranges(values) == {"low": [[-2.0, 0.5]], "high": [[1.0, 3.0]]}


def test_attention_to_separators_is_a_mean_over_tokens_and_examples():
    first = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    second = torch.tensor([[[1.0, 0.0, 0.0], [0.2, 0.4, 0.4], [0.0, 0.5, 0.5]]])
    found = attention_maps([[first, second]], [[1], [1, 2]])
    mean = ((0.5 + 0.75) / 2 + (0 + 0.8 + 1.0) / 3) / 2
    assert found["separators"] == [[pytest.approx(mean, abs=1e-4)]]
    assert found["maps"] == [[[[0.5, 0.5], [0.25, 0.75]]]]
    assert attention_maps([[first]], [[]])["separators"] is None


def test_observed_values_are_those_of_the_model_without_padding(run):
    sample = examples(run, 3)
    assert all(bool(example.batch["attention_mask"].all()) for example in sample)
    assert len({len(example.tokens) for example in sample}) > 1, "lengths differ"
    run.instruments.context.enabled = False
    seen = collect(run, [OUTPUT], sample)[OUTPUT]
    run.instruments.context.enabled = True
    model, expected = plain(run), []
    model.get_submodule(OUTPUT.partition(":")[0]).register_forward_hook(lambda m, i, o: expected.append(o[0]))
    with torch.no_grad():
        for example in sample:
            model(**example.batch)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind_and_other_taps_rest(run):
    called = []
    run.instruments.add_tap(OUTPUT, 1, lambda x: called.append(1) or x * 0)
    taps = run.instruments.module(run.instruments.site(OUTPUT)).taps_at("output")
    before = list(taps)
    with observing(run, {OUTPUT: lambda x: None}):
        assert len(taps) == 1
        run.student(**examples(run, 1)[0].batch)
    assert not called
    assert taps == before
    taps.clear()
    assert run.instruments.context.taps_active is False


def test_a_site_that_the_model_lacks_is_an_error(run):
    with pytest.raises(SiteError, match="no site"), observing(run, {"bert.nothing:output": lambda x: None}):
        pass
    with pytest.raises(SiteError, match="matches no site"):
        select(run, quantized(run)[1], ["bert.nothing*"])


def test_noise_of_a_weight_and_an_input(run):
    sample = examples(run, 2)
    found = signal_to_noise(run, sample)
    assert found.keys() == run.plan.sites.keys()
    name = "bert.encoder.layer.1.intermediate.dense"
    weight = run.student.get_parameter(f"{name}.weight").detach().double()
    scale = (weight.abs().amax(1, keepdim=True).float() / 7).double()
    rounded = (weight / scale).round().clamp(-8, 7) * scale
    expected = 10 * math.log10(weight.square().sum() / (rounded - weight).square().sum())
    assert found[f"{name}:weight"] == pytest.approx(expected, abs=1e-3)
    sums = []
    with observing(run, {INPUT: lambda x: sums.append(x.double())}), torch.no_grad():
        run.student.eval()
        for example in sample:
            run.student(**example.batch)
    steps = [(x.abs().amax(-1, keepdim=True).float() / 127.5).double() for x in sums]
    errors = [
        ((x / step).round().clamp(-128, 127) * step - x).square().sum() for x, step in zip(sums, steps, strict=True)
    ]
    signals = [x.square().sum() for x in sums]
    assert abs(10 * math.log10(signals[0] / errors[0]) - 10 * math.log10(signals[1] / errors[1])) > 0.02
    assert found[INPUT] == pytest.approx(10 * math.log10(sum(signals) / sum(errors)), abs=5e-3)


def test_ablation_goes_from_none_to_all(run):
    weights, activations = quantized(run)
    everything = {"everything": [*weights, *activations], WEIGHTS: weights}
    found = ablate(run, everything)
    whole, parts = found["groups"]
    assert whole["without"] == found["full_precision"]
    assert whole["alone"] == found["quantized"]
    assert (whole["sites"], parts["sites"]) == (len(run.plan.sites), len(weights))
    model, right = plain(run), 0
    rows = run.data.validation
    with torch.no_grad():
        for row in rows:
            batch = run.data.collate([row])
            right += int(
                model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax() == batch["labels"][0]
            )
    assert found["full_precision"] == pytest.approx(right / len(rows))


def test_suggestion_takes_groups_until_the_loss_is_small_enough(run, monkeypatch):
    groups = grouped(quantized(run)[1], "kind")
    first, second, third = list(groups)[:3]
    values = {frozenset({second}): 0.7, frozenset({first, second}): 0.79}
    effects = [{"group": first, "without": 0.6}, {"group": second, "without": 0.7}, {"group": third, "without": 0.4}]
    table = {"higher_is_better": True, "quantized": 0.5, "full_precision": 0.8, "groups": effects}

    def measured(run, sites, bits):
        return values[frozenset(name for name in groups if set(groups[name]) <= set(sites))]

    monkeypatch.setattr("qpipe.analysis.suggest.at_bits", measured)
    found = suggest(run, table, groups, within=0.02)
    assert [step["group"] for step in found["chosen"]] == [second, first]
    assert found["reached"] is True
    assert [rule["site"] for rule in found["rules"]] == [*groups[second], *groups[first]]
    assert all(rule["options"]["bits"] == 16 for rule in found["rules"])
    assert suggest(run, table, groups, within=0.3)["chosen"] == []
    short = suggest(run, table, groups, within=0.0)
    assert short["reached"] is False and len(short["chosen"]) == 2, "the third group does not help"
    with pytest.raises(ConfigError, match="0 or more"):
        suggest(run, table, groups, within=-1)
    with pytest.raises(ConfigError, match="no activation has fewer than 8 bits, so a plan with 8 changes none"):
        suggest(run, table, groups, within=0.02, bits=8)


def test_outliers_are_not_hidden_by_a_range_that_clips(tmp_path):
    """The input of a normalisation is looked at before its own quantizer, but behind those of what it is the sum of."""
    clipping = {"granularity": "tensor", "dynamic": False, "range": "percentile", "range_options": {"percentile": 60}}
    rules = [{"site": OUTPUT, "quantizer": "uniform-activation", "options": clipping}]
    config = tiny_config(tmp_path, quantization__rules=rules, train__max_steps=1)
    run = load(qpipe.execute(config).out)
    after = "bert.encoder.layer.0.output.LayerNorm:input"
    session = Session(Source(run.out, lambda: run), Request(("outliers",), sequences=2, sites=(after,)))
    found = dict(session.values())[after]
    quantized_sum = collect(run, [after], session.sample)[after]
    assert all(float((a - b).abs().max()) > 0.01 for a, b in zip(found, quantized_sum, strict=True))
    activations = [name for name in run.plan.sites if not name.endswith(":weight")]
    with switched_off(run, activations):
        plainly = collect(run, [after], session.sample)[after]
    assert all(torch.equal(a, b) for a, b in zip(found, plainly, strict=True))
    assert run.instruments.quantizers()[OUTPUT].context.enabled, "it is on again"


def test_outliers_and_ranges_look_where_nothing_is_quantized_too(run):
    """The plan `w4a8` quantizes what linear maps in the blocks receive; what they return has a role in the model."""
    found = analyze(run, Request(("outliers", "ranges"), sequences=2))
    outputs = [f"bert.encoder.layer.{n}.output.{site}" for n in (0, 1) for site in ("dense:output", "LayerNorm:input")]
    assert not set(outputs) & run.plan.sites.keys()
    planned = [name for name in run.plan.sites if not name.endswith(":weight")]
    for part in ("outliers", "ranges"):
        names = list(found[part]["sites"])
        assert {*outputs, *planned, "bert.embeddings.LayerNorm:output"} <= set(names)
        assert not [name for name in names if "pooler" in name or "classifier" in name], "these have no tokens"
        assert len(names) < len([site for site in run.instruments.sites.values() if site.slot != "weight"])
    stored = json.loads((run.out / "analysis" / "outliers.json").read_text())["sites"]
    assert stored == found["outliers"]["sites"]


def test_few_sites_at_a_time_have_the_same_values(run, monkeypatch):
    session = Session(Source(run.out, lambda: run), Request(("ranges",), sequences=2))
    before = list(session.values())
    assert len(before) > 20
    monkeypatch.setattr("qpipe.analysis.session.AT_ONCE", 3)
    after = list(session.values())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(
        torch.equal(a, b) for (_, x), (_, y) in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_patterns_select_as_in_rules(run):
    names = list(run.instruments.sites)
    assert not [name for name in select(run, names, ["*:output"]) if "LayerNorm" in name]
    assert select(run, names, ["*.output.LayerNorm:output"])


def test_lower_is_better_is_ranked_the_other_way(run, monkeypatch):
    groups = grouped(quantized(run)[1], "kind")
    first, second = list(groups)[:2]
    effects = [{"group": first, "without": 2.5}, {"group": second, "without": 2.1}]
    table = {"higher_is_better": False, "quantized": 3.0, "full_precision": 2.0, "groups": effects}
    monkeypatch.setattr("qpipe.analysis.suggest.at_bits", lambda run, sites, bits: 2.1)
    assert [step["group"] for step in suggest(run, table, groups, within=0.2)["chosen"]] == [second]


def test_parts_are_kept_and_not_measured_twice(run, tmp_path, monkeypatch):
    run.config = run.config.model_copy(update={"out": str(tmp_path)})
    request = Request(("ablation", "outliers", "ranges", "attention", "noise"), examples=16, sequences=2)
    told = []
    first = analyze(run, request, told=told.append)
    assert len(first["ablation"]["groups"]) == 1 + len(grouped(quantized(run)[1], "role", run.instruments.map.sites))
    assert len(first["attention"]["maps"]) == 2
    monkeypatch.setattr(ablation_module, "evaluate", lambda run: pytest.fail("measured again"))
    assert analyze(run, request) == first
    assert analyze(run, Request(("noise",), sequences=1))["noise"]["settings"] == {"sequences": 1}
    html = analysis(tmp_path)
    assert all(title in html for title in ("Which sites hurt", "Outliers", "Ranges of tokens", "Attention", "noise"))
    assert html.count("<figure><svg") == html.count("<figure>") >= 8, "ablation, ranges, attention, each layer, noise"
    assert analysis(tmp_path / "elsewhere") is None


def test_requests_are_checked():
    with pytest.raises(ConfigError, match="did you mean 'outliers'"):
        Request(("outlier",))
    with pytest.raises(ConfigError, match="name the part `ablation` too"):
        Request(("noise",), within=0.1)
