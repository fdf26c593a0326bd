"""`qpipe analyze --suggest` measures sites at more bits as a run by the suggested plan has them."""

import pytest
import torch
from qpipe_peg.quantizer import PegActivation

from qpipe.stages.quantize import quantized_model
from qpipe.stages.recalibrate import recalibrated
from qpipe.stages.variants import rebuilt
from qpipe.testing import tiny_config

ROLES = ("ffn_input", "ffn_output", "ffn_sum")


def load(folder, bits):
    """A model whose feed-forward networks are quantized in groups of features, at these bits by role."""
    rules = [
        {"site": f"{{{role}}}", "quantizer": "peg", "options": {"bits": bits.get(role, 4), "groups": 4}}
        for role in ROLES
    ]
    quantization = {"quantization__preset": "w8", "quantization__rules": rules, "export__format": "native"}
    return quantized_model(tiny_config(folder, {"peg": {"rules": False}}, **quantization))


def groups(run):
    """Width and state of every quantizer with groups, by site."""
    found = {site: q for site, q in run.instruments.quantizers().items() if isinstance(q, PegActivation)}
    return {site: (q.bits, {key: value.clone() for key, value in q.state_dict().items()}) for site, q in found.items()}


@pytest.mark.parametrize("role", ROLES)
def test_order_and_ranges_are_those_of_the_plan(tmp_path, role):
    run, planned = load(tmp_path, {}), load(tmp_path, {role: 16})
    changed = list(run.instruments.map.sites[role])
    with rebuilt(run, changed, 16), recalibrated(run, changed):
        found = groups(run)
    assert {found[site][0] for site in changed} == {16} and len(found) == 6
    for site, (bits, state) in groups(planned).items():
        assert found[site][0] == bits
        for name, value in state.items():
            assert torch.equal(found[site][1][name], value), f"{site}: {name}"
