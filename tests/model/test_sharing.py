"""Linear maps of one block that read the same activation quantize it once, and no bit changes by that."""

from contextlib import contextmanager

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.sharing import Shared

READS = {"bert": (6, 4), "llama": (7, 4)}
"""Linear maps of a block, and different activations that they read."""


@contextmanager
def saved_storages(found):
    def pack(tensor):
        found.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def step(model, ids):
    """Logits, the gradient of every weight, and how many tensors were kept for the backward pass."""
    model.zero_grad()
    kept = []
    with saved_storages(kept):
        logits = model(ids).logits
        logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], len(set(kept))


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor", "narrow": True, "clip": 0.5}], ids=["token", "clip"])
@pytest.mark.parametrize("family", READS)
def test_neighbours_share_what_they_read(family_model, instrumented, monkeypatch, quantized_sites, family, options):
    model = family_model(family)
    found = instrumented(model)
    for site in found.sites.values():
        if site.slot == "input" and not site.by_name and site.path.startswith(found.map.blocks):
            found.put(site, UniformActivation(ActivationOptions(**options)))
    maps, different = READS[family]
    ids = torch.arange(5, 17).view(2, 6)
    shared, kept = step(model, ids)
    assert len(quantized_sites) == 2 * different, "two blocks"
    monkeypatch.setattr(Shared, "made", lambda self, value, what, make: make())
    quantized_sites.clear()
    alone, kept_alone = step(model, ids)
    assert len(quantized_sites) == 2 * maps
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True)), "bits"
    masks = 2 if "clip" in options else 1
    assert kept_alone - kept == 2 * masks * (maps - different), "one copy for the backward pass in place of several"
