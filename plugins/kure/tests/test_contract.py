from qpipe_kure import Kure

from qpipe.testing import check_plugin


def test_contract():
    check_plugin(Kure, "kure")
