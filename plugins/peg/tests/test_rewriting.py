"""The network of tensors that is equal to one with groups."""

import json

import pytest
import torch
from qpipe_peg import rewrite

import qpipe
from qpipe import FixedActivation, FormatError
from qpipe.config import resolve
from qpipe.testing import tiny_config, tiny_model

GROUPS = 4


@pytest.fixture(scope="module", params=["bert", "roberta", "ernie", "distilbert"])
def exported(request, tmp_path_factory):
    """A folder in the native format, its activations, and inputs."""
    folder = tmp_path_factory.mktemp(request.param)
    rules = [{"site": "{block}.*:weight", "quantizer": "uniform", "options": {"bits": 8}}]
    config = tiny_config(
        folder,
        {"peg": {"groups": GROUPS}},
        train__max_steps=1,
        quantization__preset="a8-outputs",
        quantization__rules=rules,
        export__format="native",
    )
    model = str(tiny_model(folder / request.param, request.param))
    run = qpipe.execute(resolve({**config.model_dump(mode="json"), "model": {"name": model}}))
    export = run.out / "export"
    layout = json.loads((export / "quantization.json").read_text())
    tokens = torch.randint(5, 31, (3, 11), generator=torch.Generator().manual_seed(0))
    return export, layout["activations"], {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Codes:
    """Keeps the codes of what passes a quantizer, in order of the calls."""

    def __init__(self, monkeypatch):
        self.found = []
        plain = FixedActivation.quantize

        def quantize(quantizer, value, out=None):
            self.found.append(quantizer.encode(value).integers())
            return plain(quantizer, value, out)

        monkeypatch.setattr(FixedActivation, "quantize", quantize)

    def run(self, model, inputs):
        self.found = []
        with torch.no_grad():
            logits = model(**inputs).logits
        return logits, self.found


def loaded(export):
    """In float64, where sums in another order differ by less than any rounding to codes could notice."""
    return qpipe.load_native(export).double()


def test_every_integer_is_the_same(exported, monkeypatch):
    export, activations, inputs = exported
    codes = Codes(monkeypatch)
    grouped = [a for a in activations if a["granularity"] == "group"]
    plain = loaded(export)
    qpipe.quantize_activations(plain, grouped)
    logits, expected = codes.run(plain, inputs)

    tensors = loaded(export)
    rest = rewrite(tensors, grouped)
    assert rest == []
    rewritten, parts = codes.run(tensors, inputs)
    assert len(expected) == 6 and len(parts) == 6 * GROUPS
    place = {a["module"]: tuple(a["order"]) for a in grouped}
    orders = sorted({(module.split("layer.")[1][0], order) for module, order in place.items()})
    assert len(orders) == 2
    for number, codes_of_site in enumerate(expected):
        order = torch.tensor(orders[number // 3][1])
        assert not torch.equal(order, torch.arange(32))
        together = torch.cat(parts[number * GROUPS : (number + 1) * GROUPS], dim=-1)
        assert torch.equal(together, codes_of_site[..., order])
        assert len(together.unique()) > 50
    torch.testing.assert_close(rewritten, logits, rtol=0, atol=1e-12)


def test_the_rest_is_quantized_as_before(exported):
    export, activations, inputs = exported
    plain, tensors = loaded(export), loaded(export)
    qpipe.quantize_activations(plain, activations)
    rest = rewrite(tensors, activations)
    assert len(rest) == len(activations) - 6
    qpipe.quantize_activations(tensors, rest)
    with torch.no_grad():
        torch.testing.assert_close(tensors(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-12)


def test_only_whole_tensors_are_left(exported):
    export, activations, _ = exported
    model = qpipe.load_native(export)
    rewrite(model, activations)
    found = [m for m in model.modules() if isinstance(m, FixedActivation)]
    assert len(found) == 6 * GROUPS and all(m.scale.numel() == 1 for m in found)
    split = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and 32 // GROUPS in m.weight.shape]
    assert len(split) == 2 * 2 * GROUPS


def test_the_rewritten_model_is_one_graph(exported):
    export, activations, inputs = exported
    model = qpipe.load_native(export, attention="eager")
    rewrite(model, [a for a in activations if a["granularity"] == "group"])
    with torch.no_grad():
        graph = torch.export.export(model, (), inputs).module()
        torch.testing.assert_close(graph(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_rewritten(exported):
    export, activations, _ = exported
    model = qpipe.load_native(export)
    grouped = [a for a in activations if a["granularity"] == "group"]
    with pytest.raises(FormatError, match="nothing to rewrite"):
        rewrite(model, [a for a in activations if a["granularity"] != "group"])
    with pytest.raises(FormatError, match=r"layer.0 has groups at .*; what can be rewritten has them at"):
        rewrite(model, grouped[1:])
    other = {**grouped[0], "order": grouped[0]["order"][::-1]}
    with pytest.raises(FormatError, match="orders or numbers of groups of their own; set peg.shared=true"):
        rewrite(model, [other, *grouped[1:]])
    assert not any(type(m).__module__.startswith("qpipe_peg") for m in model.modules()), "refused before any change"
