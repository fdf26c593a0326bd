import pytest
from qpipe_teacher_intervention import GradualIntervention, MapIntervention, OutputIntervention

from qpipe.testing import check_plugin


# The tiny run has six steps and is resumed after the third, which is where these two-step runs change.
@pytest.mark.parametrize(
    ("plugin", "name", "options"),
    [
        (OutputIntervention, "ti-o", {"preset": "reference", "steps": 3}),
        (MapIntervention, "ti-m", {"preset": "paper", "steps": 3}),
        (GradualIntervention, "ti-g", {}),
        (GradualIntervention, "ti-g", {"preset": "paper", "steps": 3}),
        (GradualIntervention, "ti-g", {"preset": "reference", "steps": 3}),
    ],
    ids=["ti-o-reference", "ti-m-paper", "ti-g", "ti-g-paper", "ti-g-reference"],
)
def test_contract(plugin, name, options):
    check_plugin(plugin, name, options)
