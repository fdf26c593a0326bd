"""What calibration shows the quantizers in a run: whole batches, and which tokens."""

import pytest
import torch
from qpipe_peg import PegActivation
from safetensors.torch import load_file, save_file

from qpipe.host import load_plugins
from qpipe.stages.calibrate import inputs_of, observed_batches
from qpipe.stages.execute import assemble
from qpipe.stages.variants import switched_off
from qpipe.testing import tiny_config
from qpipe.testing.tiny import SPECIAL

SETTINGS = {"quantization__preset": None, "quantization__calibration_batches": 2, "export__format": "native"}
MARKED = 3
"""A feature."""


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


def mark_padding(folder):
    """Give padding an embedding that stands out in one feature, as no word does."""
    tiny_config(folder)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    row = tensors["bert.embeddings.word_embeddings.weight"][SPECIAL.index("[PAD]")]
    row.zero_()
    row[MARKED] = 5.0
    save_file(tensors, path, metadata={"format": "pt"})


def received(run, path):
    """What a normalisation receives in calibration, before it is quantized, and which tokens are real."""
    kept = []
    hook = run.student.get_submodule(path).register_forward_pre_hook(lambda module, args: kept.append(args[0].double()))
    run.student.eval()
    with switched_off(run, list(run.plan.sites)), torch.no_grad():
        batches = [batch for _, batch in observed_batches(run, 2)]
        for batch in batches:
            run.student(**inputs_of(batch))
    hook.remove()
    return torch.cat(kept), torch.cat([batch["attention_mask"] for batch in batches]).bool()


@pytest.mark.parametrize("padding", [False, True])
def test_padding_counts_where_it_is_asked_for(padding, tmp_path):
    """Computed again from what the layer receives: K = 4 runs of 8 features in the order of their ranges."""
    mark_padding(tmp_path)
    run, found = ranges(tmp_path, {"shared": False}, quantization__calibration_padding=padding)
    path = "bert.encoder.layer.0.output.LayerNorm"
    values, real = received(run, path)
    assert 0 < int((~real).sum()) < real.numel()
    scales, orders = {}, {}
    for counted, kept in ((values[real], False), (values.flatten(0, 1), True)):
        low, high = counted.amin(0), counted.amax(0)
        orders[kept] = (high - low).argsort().tolist()
        groups = [orders[kept][start : start + 8] for start in range(0, 32, 8)]
        scales[kept] = [(float(high[g].max()) - float(low[g].min())) / 255 for g in groups]
    assert (orders[False][-1] == MARKED, orders[True][-1] == MARKED) == (False, True), "padding widens its feature"
    assert scales[True][-1] > 1.2 * scales[False][-1]
    described = found[f"{path}:input"]
    assert described.order == orders[padding]
    assert described.scale == pytest.approx(scales[padding], rel=1e-5)
