from qpipe_distillation import Distillation

from qpipe.testing import check_plugin


def test_contract():
    check_plugin(Distillation, options={"hidden": "mse", "attention": "mse"})
