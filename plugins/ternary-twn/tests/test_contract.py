from qpipe_ternary_twn import TernaryTwn

from qpipe.testing import check_plugin


def test_contract():
    check_plugin(TernaryTwn, "ternary-twn")
