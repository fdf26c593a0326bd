"""Where groups go, whose order they share, and what is refused before a run begins."""

import pytest
from qpipe_peg import PegActivation

from qpipe import ConfigError, FormatError, SiteError
from qpipe.config import resolve
from qpipe.stages import plan_run
from qpipe.testing import tiny_config, tiny_model

NATIVE = {"export__format": "native", "quantization__preset": None}


def planned(folder, family=None, options=None, **changes):
    settings = {**NATIVE, **changes}
    config = tiny_config(folder, {"peg": {"groups": 4, **(options or {})}}, **settings)
    if family:
        source = config.model_dump(mode="json")
        config = resolve({**source, "model": {"name": str(tiny_model(folder / family, family))}})
    return plan_run(config)


def groups(run):
    return {s: q for s, q in run.instruments.quantizers().items() if isinstance(q, PegActivation)}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_sites_around_the_feed_forward_network_share_its_outputs_order(family, tmp_path):
    run = planned(tmp_path, family)
    roles = run.instruments.map.sites
    found = groups(run)
    assert set(found) == {*roles["ffn_input"], *roles["ffn_output"], *roles["ffn_sum"]} and len(found) == 6
    for block in range(2):
        x, h, y = (found[roles[role][block]] for role in ("ffn_input", "ffn_output", "ffn_sum"))
        assert x.shared_with == (h,) and y.shared_with == (h,) and h.shared_with == ()
    assert {len(q.order) for q in found.values()} == {32}
    entry = run.plan.sites[roles["ffn_sum"][0]]
    assert (entry.quantizer, entry.bits, entry.granularity) == ("peg", 8, "group")


def test_orders_of_their_own(tmp_path):
    assert all(not q.shared_with for q in groups(planned(tmp_path, options={"shared": False})).values())


def test_without_the_output_the_sum_gives_the_order(tmp_path):
    run = planned(tmp_path, quantization__rules=[{"site": "{ffn_output[0]}", "quantizer": "none"}])
    roles, found = run.instruments.map.sites, groups(run)
    assert len(found) == 5
    assert found[roles["ffn_input"][0]].shared_with == (found[roles["ffn_sum"][0]],)


def test_everywhere(tmp_path):
    """Per block: q, k, v, context, attention output and sum, x, h, y, block output; three around the embeddings."""
    found = groups(planned(tmp_path, options={"everywhere": True}))
    assert len(found) == 2 * 10 + 3
    assert not any(":raw_scores" in site or ":probs" in site or "act_fn" in site for site in found)


def test_blocks_that_normalise_first(tmp_path):
    """Queries and keys are rotated in attention, which has no groups; one embedding, and a last normalisation."""
    (tmp_path / "text.jsonl").write_text('{"text": "the movie was good fun"}\n' * 20)
    source = {
        "model": {"name": str(tiny_model(tmp_path / "llama", "llama"))},
        "task": "causal-lm",
        "data": {"train": str(tmp_path / "text.jsonl"), "max_length": 8, "validation_fraction": 0.2},
        "quantization": {"preset": None},
        "plugins": {"peg": {"groups": 4, "everywhere": True}},
        "export": {"format": "native"},
        "out": str(tmp_path / "run"),
    }
    run = plan_run(resolve(source))
    roles, found = run.instruments.map.sites, groups(run)
    assert len(found) == 2 * 8 + 2 and {len(q.order) for q in found.values()} == {32, 16}  # 16: grouped values
    x, h, y = (found[roles[role][1]] for role in ("ffn_input", "ffn_output", "ffn_sum"))
    assert x.shared_with == y.shared_with == (h,)
    ffn_only = {**source, "plugins": {"peg": {"groups": 4}}, "export": {"format": "peg-tensors"}}
    with pytest.raises(
        FormatError, match=r"what can be rewritten has them .* models that normalise after the residual"
    ):
        plan_run(resolve(ffn_only))


def test_groups_have_to_divide_the_features(tmp_path):
    with pytest.raises(SiteError, match=r"attention.output.LayerNorm:output: 5 groups do not divide its 32 features"):
        planned(tmp_path, options={"groups": 5})


def test_a_site_that_the_model_does_not_have(tmp_path):
    with pytest.raises(SiteError, match="ffn_product"):
        planned(tmp_path, options={"sites": ["{ffn_product}"]})
    with pytest.raises(SiteError, match="stands for nothing"):
        planned(tmp_path, options={"sites": ["{ffn_outputs}"]})


def test_a_site_without_known_features(tmp_path):
    with pytest.raises(SiteError, match="intermediate_act_fn:output: groups of features are for .* GELUActivation"):
        planned(tmp_path, options={"sites": ["{ffn_activation}"]})


def test_attention_has_no_groups(tmp_path):
    with pytest.raises(SiteError, match="'peg' serves input, output, stream, sum, not .*:probs"):
        planned(tmp_path, options={"sites": ["{probs}"]})


def test_no_site_at_all(tmp_path):
    with pytest.raises(SiteError, match="no rule gives an activation groups; set peg.rules=true"):
        planned(tmp_path, options={"rules": False})


def test_no_calibration_data(tmp_path):
    with pytest.raises(ConfigError, match="calibration_batches: .*give 1 or more, not 0"):
        planned(tmp_path, quantization__calibration_batches=0)


def test_compressed_tensors_names_the_format_that_holds_groups(tmp_path):
    weights = [{"site": "{block}.*:weight", "quantizer": "uniform", "options": {"bits": 8}}]
    settings = {"export__format": "compressed-tensors", "quantization__rules": weights}
    with pytest.raises(FormatError, match="static activation ranges per group do not fit; use export.format: native"):
        planned(tmp_path, options={"sites": ["{ffn_output}"]}, **settings)
    run = planned(tmp_path, options={"sites": ["{ffn_output}"], "groups": 1}, **settings)
    assert {run.plan.sites[site].granularity for site in groups(run)} == {"tensor"}
