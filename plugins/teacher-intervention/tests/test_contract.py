import pytest
from qpipe_teacher_intervention import GradualIntervention, MapIntervention, OutputIntervention

from qpipe.testing import check_plugin

SLOW = pytest.mark.slow


# The tiny run has six steps and is resumed after the third, which is where these two-step runs change.
@pytest.mark.parametrize(
    ("plugin", "name", "options"),
    [
        pytest.param(OutputIntervention, "ti-o", {"preset": "reference", "steps": 3}, id="ti-o-reference", marks=SLOW),
        pytest.param(OutputIntervention, "ti-o", {"preset": "paper", "steps": 3}, id="ti-o-paper", marks=SLOW),
        pytest.param(MapIntervention, "ti-m", {"preset": "paper", "steps": 3}, id="ti-m-paper", marks=SLOW),
        pytest.param(MapIntervention, "ti-m", {"preset": "reference", "steps": 3}, id="ti-m-reference", marks=SLOW),
        pytest.param(GradualIntervention, "ti-g", {}, id="ti-g"),
        pytest.param(GradualIntervention, "ti-g", {"preset": "paper", "steps": 3}, id="ti-g-paper", marks=SLOW),
        pytest.param(GradualIntervention, "ti-g", {"preset": "reference", "steps": 3}, id="ti-g-reference"),
    ],
)
def test_contract(plugin, name, options):
    check_plugin(plugin, name, options)
