import pytest
from qpipe_ternary_twn import TernaryTwn

from qpipe import SiteError
from qpipe.host import load_plugins
from qpipe.stages.execute import assemble
from qpipe.testing import check_plugin, check_rules, tiny_config
from qpipe.testing.contract import check_absent, find_plugin, offers


def test_contract():
    check_plugin(TernaryTwn, "ternary-twn")


def test_the_part_without_the_plugin_leaves_out_rules_that_need_it(tmp_path):
    offered = offers(find_plugin(TernaryTwn, "ternary-twn"), {})
    assert offered["qpipe_quantizers"] == {"ternary-twn"}
    rules = [{"site": "{block}.*:weight", "quantizer": "ternary-twn"}]
    check_absent(tmp_path, TernaryTwn, offered, {"quantization__rules": rules, "train__max_steps": 1})


def test_groups_are_trained_resumed_and_exported():
    options = {"granularity": "group", "group_size": 8}
    rules = [
        {"site": site, "quantizer": "ternary-twn", "options": options}
        for site in ("{block}.*:weight", "{embedding}:weight")
    ]
    check_rules(rules, zero3=False, plugins={"ternary-twn": {"rules": False}})


@pytest.mark.parametrize("options", [{"rules": False}, {"sites": []}])
def test_a_plugin_that_does_nothing_is_refused(tmp_path, options):
    config = tiny_config(tmp_path, plugins={"ternary-twn": options})
    with pytest.raises(SiteError, match="'ternary-twn' is named, but no rule makes a weight ternary"):
        assemble(config, load_plugins(config.plugins), {})
