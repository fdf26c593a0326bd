import pytest
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"preset": "xtc"}, {"preset": "tinybert", "steps": 1}], ids=["xtc", "tinybert"])
def test_contract_of_other_presets(options):
    """With one step of layers, the run resumes at the border, and gradients on both sides of it are compared."""
    check_plugin(Distillation, options=options)
