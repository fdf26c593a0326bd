from qpipe_distillation import Distillation

from qpipe.testing import check_plugin


def test_contract():
    check_plugin(
        Distillation,
        options={
            "preset": "ternarybert",
            "output": "cosine",
            "hidden_weight": {"schedule": "cosine", "initial": 0.5, "final": 2},
        },
    )
