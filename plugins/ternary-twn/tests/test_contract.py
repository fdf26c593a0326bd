from qpipe_ternary_twn import TernaryTwn

from qpipe.testing import check_plugin, check_rules


def test_contract():
    check_plugin(TernaryTwn, "ternary-twn")


def test_groups_are_trained_resumed_and_exported():
    options = {"granularity": "group", "group_size": 8}
    rules = [
        {"site": site, "quantizer": "ternary-twn", "options": options}
        for site in ("{block}.*:weight", "{embedding}:weight")
    ]
    check_rules(rules, zero3=False, plugins={"ternary-twn": {"rules": False}})
