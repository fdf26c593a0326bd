"""What calibration shows the quantizers in a run: whole batches, and which tokens."""

import pytest
from qpipe_peg import PegActivation

from qpipe.host import load_plugins
from qpipe.stages.execute import assemble
from qpipe.testing import tiny_config

SETTINGS = {"quantization__preset": None, "quantization__calibration_batches": 2, "export__format": "native"}


def ranges(folder, options, **changes):
    """A run before its first step, and its ranges by site."""
    config = tiny_config(folder, {"peg": {"groups": 4, **options}}, **SETTINGS, **changes)
    run = assemble(config, load_plugins(config.plugins), {})
    found = run.instruments.quantizers().items()
    return run, {site: q.describe() for site, q in found if isinstance(q, PegActivation)}


@pytest.mark.parametrize("statistic", ["last", "ema"])
def test_the_size_of_evaluation_batches_changes_no_range(statistic, tmp_path):
    options = {"statistics": statistic, "range": statistic}
    _, whole = ranges(tmp_path, options)
    _, parts = ranges(tmp_path, options, train__eval_batch_size=5)
    assert len(whole) == 6 and whole.keys() == parts.keys()
    for site, expected in whole.items():
        assert parts[site].order == expected.order
        assert parts[site].scale == pytest.approx(expected.scale, rel=1e-5)
        assert parts[site].zero_point == expected.zero_point
