import pytest
from qpipe_teacher_intervention import GradualIntervention, MapIntervention, OutputIntervention

from qpipe.testing import check_plugin


@pytest.mark.parametrize(
    ("plugin", "name"),
    [(OutputIntervention, "ti-o"), (MapIntervention, "ti-m"), (GradualIntervention, "ti-g")],
    ids=["ti-o", "ti-m", "ti-g"],
)
def test_contract(plugin, name):
    check_plugin(plugin, name)
