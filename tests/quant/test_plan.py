"""From rules to a plan."""

import json
from dataclasses import replace
from itertools import permutations

import pytest

from qpipe import ConfigError, ModelMap, Rule, Site, SiteError
from qpipe.builtin.uniform import UniformQuantizers
from qpipe.quant.plan import expand, make_plan
from qpipe.quant.presets import PRESETS, preset_rules

KINDS = {kind.name: kind for kind in UniformQuantizers().qpipe_quantizers()}
MAP = ModelMap(
    blocks=("enc.0", "enc.1"),
    embedding="words",
    head=("pool", "classifier"),
    norms=("enc.0.norm", "enc.1.norm"),
    sites={"ffn_output": ("enc.0.out:output", "enc.1.out:output"), "ffn_sum": ("enc.0.norm:input", "enc.1.norm:input")},
)
PATHS = ("words", "enc.0.q", "enc.0.out", "enc.1.q", "enc.1.out", "pool", "classifier")
SITES = [
    Site(path, slot, "Embedding" if path == "words" else "Linear", (8, 8) if slot == "weight" else ())
    for path in PATHS
    for slot in (("weight", "output") if path == "words" else ("weight", "input", "output"))
]
WITHIN = [
    *SITES,
    *(Site(f"enc.{i}.norm", slot, "LayerNorm", (), by_name=True) for i in (0, 1) for slot in ("weight", "input")),
    *(Site(f"enc.{i}.attention", slot, "Attention") for i in (0, 1) for slot in ("query", "key", "value", "probs")),
]
"""With normalisations, and with sites inside attention."""


def plan(*rules, model_map=MAP):
    return make_plan(SITES, [("configuration", Rule(*rule)) for rule in rules], KINDS, model_map)


def names(*rules):
    return list(plan(*rules).sites)


def test_block_embedding_and_head_stand_for_paths():
    assert expand("{block}.q:weight", MAP) == ["enc.0.q:weight", "enc.1.q:weight"]
    assert names(("{block}.*:weight", "uniform")) == [f"enc.{i}.{n}:weight" for i in (0, 1) for n in ("q", "out")]
    assert names(("{embedding}:weight", "uniform")) == ["words:weight"]
    assert names(("{head}:weight", "uniform")) == ["pool:weight", "classifier:weight"]


def test_patterns_match_case_and_whole_names():
    assert names(("enc.?.q:weight", "uniform")) == ["enc.0.q:weight", "enc.1.q:weight"]
    assert names(("*:input", "uniform-activation"))[:2] == ["enc.0.q:input", "enc.0.out:input"]
    with pytest.raises(SiteError):
        plan(("Enc.0.q:weight", "uniform"))
    with pytest.raises(SiteError):
        plan(("enc.0.q", "uniform"))


def test_the_last_match_wins_and_the_plan_keeps_the_order_of_the_model():
    made = plan(
        ("pool:weight", "uniform", {"bits": 2}),
        ("*.q:weight", "uniform", {"bits": 4}),
        ("enc.0.*:weight", "uniform", {"bits": 3, "granularity": "tensor", "symmetric": False}),
    )
    assert {name: (e.bits, e.granularity, e.zero_point) for name, e in made.sites.items()} == {
        "enc.0.q:weight": (3, "tensor", "integer"),
        "enc.0.out:weight": (3, "tensor", "integer"),
        "enc.1.q:weight": (4, "channel", "none"),
        "pool:weight": (2, "channel", "none"),
    }


def test_none_takes_sites_out_and_a_later_rule_puts_them_back():
    everything, without = ("*:weight", "uniform"), ("enc.*:weight", "none")
    assert names(everything, without) == ["words:weight", "pool:weight", "classifier:weight"]
    assert names(everything, without, ("enc.1.q:weight", "uniform"))[1] == "enc.1.q:weight"


def test_a_rule_that_matches_nothing_suggests_the_nearest_site():
    with pytest.raises(SiteError, match="rule 'enc.0.quer:weight' .*matches no site; did you mean 'enc.0.q:weight'"):
        plan(("enc.0.quer:weight", "uniform"))
    with pytest.raises(SiteError, match="slot one of input, output, weight"):
        plan(("zzzzzz", "uniform"))


def test_none_must_match_too():
    with pytest.raises(SiteError, match="matches no site"):
        plan(("*:weight", "uniform"), ("enc.7.*:weight", "none"))


@pytest.mark.parametrize("part", ["block", "embedding", "head"])
def test_a_part_the_model_lacks(part):
    with pytest.raises(SiteError, match=f"this model has no {part} that qpipe knows"):
        plan((f"{{{part}}}:weight", "uniform"), model_map=ModelMap())


def test_unknown_quantizer_suggests_the_nearest():
    with pytest.raises(
        SiteError, match="configuration: no quantizer is called 'unifrom'; did you mean 'uniform'.*none"
    ):
        plan(("*:weight", "unifrom"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, "bit is not an option; did you mean 'bits'"),
        ({"bits": 16}, "bits = 16"),
        ({"granularity": "group"}, "give group_size with granularity `group`"),
    ],
)
def test_wrong_options_name_rule_and_key(options, message):
    with pytest.raises(SiteError, match=message) as caught:
        plan(("{block}.q:weight", "uniform", options))
    assert "rule '{block}.q:weight' of configuration" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("pool:input", "uniform"), "'uniform' serves weight, not 'pool:input'"),
        (("pool:weight", "uniform-activation"), "'uniform-activation' serves context, input,.* not 'pool:weight'"),
    ],
)
def test_wrong_slot(rule, message):
    with pytest.raises(SiteError, match=message):
        plan(rule)


def test_json_of_a_plan():
    made = make_plan(SITES, [("preset", Rule("pool:weight", "uniform", {"bits": 4}))], KINDS, MAP)
    (entry,) = json.loads(made.dumps())
    options = entry.pop("options")
    assert entry == {
        "site": "pool:weight",
        "quantizer": "uniform",
        "bits": 4,
        "granularity": "channel",
        "source": "preset",
    }
    assert options["bits"] == 4 and options["symmetric"] is True


def selected(*patterns):
    rules = [("configuration", Rule(pattern, "uniform-activation")) for pattern in patterns]
    return list(make_plan(WITHIN, rules, KINDS, MAP).sites)


def test_roles_stand_for_whole_sites():
    assert selected("{ffn_sum}") == ["enc.0.norm:input", "enc.1.norm:input"]
    assert selected("{outputs}") == ["enc.0.out:output", "enc.1.out:output", "enc.0.norm:input", "enc.1.norm:input"]
    assert selected("{ffn_sum[1]}", "{ffn_output[-2]}") == ["enc.0.out:output", "enc.1.norm:input"]
    assert selected("{block[-1]}.*:input") == ["enc.1.q:input", "enc.1.out:input"]


def test_wildcards_alone_select_no_normalisation():
    """So that `{block}.*:weight` is what it was before normalisations had sites."""
    everything = [site.name for site in SITES if site.slot == "input"]
    assert selected("*:input") == everything
    assert selected("enc.?.*:input") == selected("{block}.*:input") == everything[:4]
    named = ["enc.0.norm:input", "enc.1.norm:input"]
    for pattern in ("{norm}:input", "*.norm:input", "enc.?.n*m:input", "*norm:input"):
        assert selected(pattern) == named, pattern
    assert selected("enc.1.norm:input") == named[1:]
    with pytest.raises(SiteError, match="rule '{norm}:probs' .*matches no site"):
        selected("{norm}:probs")
    # A word that stands for another module does not reach the normalisation behind a wildcard.
    assert selected("enc*:input") == everything[:4]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{ffn_sum[2]}", "this model has 2 of ffn_sum, counted from 0"),
        ("{block[-3]}.q:input", "this model has 2 of block"),
        ("{pooler}", "this model has no pooler that qpipe knows"),
        ("{ffn_smu}", r"\{ffn_smu\} stands for nothing; did you mean '\{ffn_sum\}'"),
    ],
)
def test_roles_that_the_model_lacks(pattern, message):
    with pytest.raises(SiteError, match=message):
        selected(pattern)


MIXED = [name for name in PRESETS if "mixed" in name]
SCHEMES = [name for name in PRESETS if "puts" in name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in (*SCHEMES, *MIXED)])
def test_presets_plan_every_block(name):
    made = make_plan(SITES, [("preset", rule) for rule in preset_rules(name)], KINDS, MAP)
    widths = {site: entry.bits for site, entry in made.sites.items()}
    blocks = [f"enc.{i}.{n}" for i in (0, 1) for n in ("q", "out")]
    expected = {"words:weight": 8}
    if name != "a8":
        expected |= {f"{block}:weight": int(name[1]) for block in blocks}
    if "a8" in name:
        expected |= {f"{block}:input": 8 for block in blocks}
    assert widths == expected


def test_presets_leave_out_an_embedding_that_the_model_lacks():
    without = replace(MAP, embedding=None)
    made = plan(*((r.site, r.quantizer, r.options) for r in preset_rules("w3", without)), model_map=without)
    assert {entry.bits for entry in made.sites.values()} == {3}
    assert preset_rules("w3", MAP) == preset_rules("w3") != preset_rules("w3", without)


def test_images_have_no_ranges_per_token():
    sites = [Site("conv", "input", "Conv2d")]
    rule = [
        ("preset", Rule("conv:input", "uniform-activation", {"granularity": granularity}))
        for granularity in ("token", "tensor")
    ]
    assert list(make_plan(sites, rule[1:], KINDS, MAP).sites) == ["conv:input"]
    with pytest.raises(SiteError, match="conv:input is an image.*granularity: tensor"):
        make_plan(sites, rule[:1], KINDS, MAP)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"granularity": "group", "group_size": 1}], ids=str
)
def test_weights_of_one_axis_have_one_scale(options):
    """In what is planned in the end: a rule that another one overrides says nothing."""
    sites = [Site("norm", "weight", "LayerNorm", (8,), by_name=True)]
    rules = [("configuration", Rule("{norm}:weight", "uniform", options))]
    model_map = ModelMap(norms=("norm",))
    told = r"norm:weight \(configuration\): granularity (channel|group) .* 8 elements.*set granularity: tensor there"
    with pytest.raises(SiteError, match=told):
        make_plan(sites, rules, KINDS, model_map)
    for quantizer, left in (("none", []), ("uniform", ["norm:weight"])):
        options = {"granularity": "tensor"} if left else {}
        made = make_plan(sites, [*rules, ("configuration", Rule("norm:weight", quantizer, options))], KINDS, model_map)
        assert list(made.sites) == left


@pytest.mark.parametrize("name", SCHEMES)
def test_presets_of_inputs_and_outputs(name):
    made = make_plan(WITHIN, [("preset", rule) for rule in preset_rules(name)], KINDS, MAP)
    weights = {site for site, entry in made.sites.items() if entry.site.slot == "weight"}
    blocks = {f"enc.{i}.{n}" for i in (0, 1) for n in ("q", "out")}
    slots = ("query", "key", "value", "probs")
    if "inputs" in name:
        expected = {f"{path}:input" for path in blocks}
        expected |= {f"enc.{i}.attention:{slot}" for i in (0, 1) for slot in slots}
        expected_weights = {"words:weight", *(f"{path}:weight" for path in blocks)}
    else:
        expected = {site for sites in MAP.sites.values() for site in sites}
        expected_weights = {site.name for site in WITHIN if site.slot == "weight"}
    assert made.sites.keys() - weights == expected
    assert weights == (expected_weights if name.startswith("w8") else set())
    assert {entry.bits for entry in made.sites.values()} == {8}


@pytest.mark.parametrize("name", MIXED)
def test_presets_of_mixed_precision(name):
    """`w8a8-outputs` with 16 bits where the name says."""
    roles = {
        "sum": ("ffn_sum",),
        "ffn": ("ffn_input", "ffn_output", "ffn_sum"),
        "mixed": ("ffn_input", "ffn_output", "ffn_sum", "logits"),
    }[name.rpartition("-")[2]]
    model_map = replace(MAP, sites={**MAP.sites, "ffn_input": ("enc.0.q:input",), "logits": ("classifier:output",)})
    base, made = (
        make_plan(WITHIN, [("preset", rule) for rule in preset_rules(n)], KINDS, model_map).sites
        for n in ("w8a8-outputs", name)
    )
    wide = {site for role in roles for site in model_map.sites[role]}
    assert {site for site, entry in made.items() if entry.bits == 16} == wide
    for site, entry in base.items():
        changes = {"bits": 16} if site in wide else {}
        if site == "classifier:output" and "logits" in roles:
            changes |= {"range": "mse-golden"}
        assert made[site].options == entry.options.model_copy(update=changes)


def test_a_specific_rule_wins_over_a_later_general_one_of_its_source():
    specific, general = Rule("enc.0.q:weight", "uniform", {"bits": 2}), Rule("*:weight", "uniform", {"bits": 4})
    middle, apart = Rule("enc.0.*:weight", "uniform", {"bits": 3}), Rule("*.q:weight", "uniform", {"bits": 5})

    def widths(*rules):
        made = make_plan(
            SITES, [(r[0], r[1]) if isinstance(r, tuple) else ("configuration", r) for r in rules], KINDS, MAP
        )
        return {site: entry.bits for site, entry in made.sites.items()}

    expected = widths(general, middle, specific)
    assert (expected["enc.0.q:weight"], expected["enc.0.out:weight"], expected["enc.1.q:weight"]) == (2, 3, 4)
    for order in permutations((general, middle, specific)):
        assert widths(*order) == expected
    # Rules that share some sites only: the later one.
    assert widths(middle, apart)["enc.0.q:weight"] == 5 and widths(apart, middle)["enc.0.q:weight"] == 3
    assert widths(specific, apart, general) == widths(general, apart, specific)
    # The same sites: the later one. Another source that comes later undoes everything.
    assert widths(specific, replace(specific, options={"bits": 6}))["enc.0.q:weight"] == 6
    assert set(widths(("preset", specific), general).values()) == {4}
    assert not widths(("preset", specific), replace(general, quantizer="none"))
    # Whoever wants to leave out nearly everything says so in any order.
    assert list(widths(specific, replace(general, quantizer="none"))) == ["enc.0.q:weight"]


def test_exceptions_that_a_later_source_undoes_are_told():
    """A rule of the configuration for all outputs also takes those to which the preset gives 16 bits."""
    wide = {"bits": 8, "granularity": "tensor", "dynamic": False, "range": "running"}
    own = Rule("{outputs}", "uniform-activation", wide)
    preset = [("preset", rule) for rule in preset_rules("w8a8-mixed-sum")]
    made = make_plan(WITHIN, [*preset, ("configuration", own)], KINDS, MAP)
    (told,) = made.lost
    assert told.startswith("rule '{outputs}' of configuration also selects 2 site(s) that preset treats apart")
    assert all(entry.bits == 8 for entry in made.sites.values())
    for kept in (replace(own, site="{ffn_sum}"), replace(own, site="{ffn_sum[0]}")):
        assert make_plan(WITHIN, [*preset, ("configuration", kept)], KINDS, MAP).lost == ()
    apart = replace(own, site="{ffn_sum}", options={**wide, "bits": 16})
    for both in ((own, apart), (apart, own)):
        kept = make_plan(WITHIN, [*preset, *(("configuration", rule) for rule in both)], KINDS, MAP)
        assert kept.lost == () and sorted({entry.bits for entry in kept.sites.values()}) == [8, 16]
    plain = [("preset", rule) for rule in preset_rules("w8a8-outputs")]
    assert make_plan(WITHIN, [*plain, ("configuration", own)], KINDS, MAP).lost == ()


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match="'w4a4' is unknown; did you mean 'w4a?8?'.*available: a8, a8-inputs"):
        preset_rules("w4a4")
    assert preset_rules(None) == ()


def test_an_unknown_word_in_braces_is_not_a_pattern():
    message = r"\{blok\} stands for nothing; did you mean '\{block\}'\?; there are \{block\}, "
    with pytest.raises(SiteError, match=message):
        expand("{blok}.*:weight", ModelMap(blocks=("a",)))
