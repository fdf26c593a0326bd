"""qpipe's attention function against those of transformers."""

import copy

import pytest
import torch
from torch import nn

from qpipe import ModelError, TapStage
from qpipe.model import attention
from qpipe.model.attention import masked

TRANSFORMERS = ("bert", "roberta", "ernie", "distilbert", "vit", "llama", "qwen3")
CASES = [(family, padded) for family in TRANSFORMERS for padded in (False, True) if not (family == "vit" and padded)]
IDS = [f"{family}{'-padded' if padded else ''}" for family, padded in CASES]


def same(x):
    return x


@pytest.fixture
def switched(instrumented):
    """Switch a model to qpipe's attention function; returns its instruments, in a training step."""

    def make(model):
        found = instrumented(model)
        found.attention(found.map.attention[0])
        found.context.taps_active = True
        return found

    return make


@pytest.mark.parametrize(("family", "padded"), CASES, ids=IDS)
def test_without_maps_it_is_stock_sdpa_bit_for_bit(family, padded, family_model, batch_of, switched):
    stock, batch = family_model(family), batch_of(family, padded)
    ours = copy.deepcopy(stock)
    stock.set_attn_implementation("sdpa")
    switched(ours)
    assert ours.config._attn_implementation == "qpipe"
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize(("family", "padded"), CASES, ids=IDS)
def test_with_maps_it_is_stock_eager(family, padded, family_model, batch_of, switched):
    stock, batch = family_model(family), batch_of(family, padded)
    ours = copy.deepcopy(stock)
    stock.set_attn_implementation("eager")
    expected = stock(**batch, output_attentions=True, output_hidden_states=True)
    maps = []
    found = switched(ours)
    for path in found.map.attention:
        found.add_tap(f"{path}:probs", TapStage.OBSERVE, lambda x: maps.append(x) or x)
    output = ours(**batch, output_hidden_states=True)
    # A query that is padding may attend to nothing in one implementation and to everything in the other.
    queries = batch["attention_mask"].bool() if padded and family not in ("llama", "qwen3") else slice(None)
    assert len(maps) == len(expected.attentions) == 2
    for found_map, expected_map in zip(maps, expected.attentions, strict=True):
        assert expected_map.detach().amax(-1).mean().item() > 1.2 / expected_map.shape[-1], (
            "attention is uniform; shows little"
        )
        torch.testing.assert_close(found_map.transpose(1, 2)[queries], expected_map.transpose(1, 2)[queries])
    for a, b in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[queries], b[queries], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[queries] if output.logits.ndim == 3 else output.logits,
                               expected.logits[queries] if output.logits.ndim == 3 else expected.logits,
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_with_maps_it_is_eager_bit_for_bit_without_padding(family, family_model, batch_of, switched):
    stock, batch = family_model(family), batch_of(family, False)
    ours = copy.deepcopy(stock)
    stock.set_attn_implementation("eager")
    found = switched(ours)
    for path in found.map.attention:
        found.add_tap(f"{path}:probs", TapStage.OBSERVE, same)
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    original = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    return calls


@pytest.mark.parametrize("slot", ["scores", "probs"])
def test_the_fused_kernel_is_left_where_a_map_is_wanted(slot, family_model, batch_of, switched, fused_calls):
    model, batch = family_model("bert"), batch_of("bert", True)
    found = switched(model)
    wanted = True
    found.add_tap(f"{found.map.attention[1]}:{slot}", TapStage.OBSERVE, same, lambda: wanted)
    model(**batch)
    assert fused_calls == [model.get_submodule(found.map.attention[0])], "only the layer with a tap builds a map"
    fused_calls.clear()
    wanted = False
    model(**batch)
    assert len(fused_calls) == 2
    fused_calls.clear()
    wanted, found.context.taps_active = True, False
    model(**batch)
    assert len(fused_calls) == 2, "outside a training step no map is built"


@pytest.mark.parametrize("slot", ["query", "key", "value", "context"])
def test_other_sites_need_no_map(slot, family_model, batch_of, switched, fused_calls):
    model = family_model("llama")
    found = switched(model)
    found.add_tap(f"{found.map.attention[0]}:{slot}", TapStage.OBSERVE, same)
    model(**batch_of("llama", False))
    assert len(fused_calls) == 2


def test_shapes_of_all_sites_with_grouped_queries(family_model, batch_of, switched):
    model = family_model("llama")
    found, shapes = switched(model), {}
    path = found.map.attention[0]
    for slot in attention.SLOTS:
        found.add_tap(f"{path}:{slot}", TapStage.OBSERVE, lambda x, s=slot: shapes.setdefault(s, tuple(x.shape)) and x)
    model(**batch_of("llama", False))
    assert shapes == {
        "query": (2, 4, 9, 8),
        "key": (2, 2, 9, 8),
        "value": (2, 2, 9, 8),
        "raw_scores": (2, 4, 9, 9),
        "scores": (2, 4, 9, 9),
        "probs": (2, 4, 9, 9),
        "context": (2, 9, 4, 8),
    }


def test_scores_are_before_the_mask_and_probs_after(family_model, batch_of, switched):
    model = family_model("llama")
    found, seen = switched(model), {}
    path = found.map.attention[0]
    for slot in ("query", "key", "raw_scores", "scores", "probs"):
        found.add_tap(f"{path}:{slot}", TapStage.OBSERVE, lambda x, s=slot: seen.setdefault(s, x))
    model(**batch_of("llama", False))
    key = seen["key"].repeat_interleave(2, 1)
    torch.testing.assert_close(seen["raw_scores"], seen["query"] @ key.transpose(-1, -2))
    torch.testing.assert_close(seen["scores"], seen["query"] @ key.transpose(-1, -2) * 8**-0.5)
    assert seen["probs"].detach().triu(1).abs().max() == 0
    torch.testing.assert_close(seen["probs"].sum(-1), torch.ones(2, 4, 9))


def test_quantizers_take_part_in_evaluation_too(family_model, batch_of, instrumented):
    from qpipe.quant.activation import ActivationOptions, UniformActivation

    model, batch = family_model("bert"), batch_of("bert", True)
    plain = model(**batch).logits
    found = instrumented(model)
    site = found.site(f"{found.map.attention[0]}:probs")
    found.put(site, UniformActivation(ActivationOptions(bits=2)))
    quantized = model(**batch).logits
    assert not torch.allclose(plain, quantized)
    found.context.enabled = False
    assert torch.equal(model(**batch).logits, plain)


def test_replaced_probabilities_decide_the_context(family_model, batch_of, switched):
    model, batch = family_model("bert"), batch_of("bert", False)
    found, seen = switched(model), {}
    path = found.map.attention[0]
    found.add_tap(f"{path}:probs", TapStage.REPLACE, lambda p: torch.eye(9).expand_as(p))
    for slot in ("value", "context"):
        found.add_tap(f"{path}:{slot}", TapStage.OBSERVE, lambda x, s=slot: seen.setdefault(s, x))
    model(**batch)
    torch.testing.assert_close(seen["context"], seen["value"].transpose(1, 2))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "block_indices"])
@pytest.mark.parametrize("maps", [False, True])
def test_features_that_are_not_computed_are_refused(name, maps, family_model, switched):
    """The fused kernel would leave `s_aux` out silently."""
    found = switched(family_model("bert"))
    path = found.map.attention[0]
    if maps:
        found.add_tap(f"{path}:probs", TapStage.OBSERVE, same)
    q, given = torch.randn(1, 4, 3, 8), {name: torch.ones(1)}
    with pytest.raises(ModelError, match=f"{path} .*uses {name!r}.*attention function does not compute; leave out"):
        found.attention(path)(nn.Module(), q, q, q, None, **given)
    with pytest.raises(ModelError, match=f"Module uses {name!r}"):
        attention.dispatch(nn.Module(), q, q, q, None, **given)


def test_position_biases_are_refused_where_maps_are_or_will_be_needed(family_model, switched):
    found = switched(family_model("bert"))
    path = found.map.attention[0]
    q, bias = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 3)
    expected = torch.softmax(q @ q.transpose(-1, -2) / 8**0.5 + bias, -1) @ q
    found.enable_capture()
    found.want(frozenset({"context"}), {})
    context, _ = found.attention(path)(nn.Module(), q, q, q, None, position_bias=bias, is_causal=False)
    torch.testing.assert_close(context, expected.transpose(1, 2))
    refused = pytest.raises(ModelError, match=f"{path} .*uses 'position_bias'.*maps do not support; leave out rules")
    found.context.taps_active = False
    found.want(frozenset({"scores"}), {})
    with refused:
        found.attention(path)(nn.Module(), q, q, q, None, position_bias=bias, is_causal=False)
    found.want(frozenset(), {})
    found.attention(path)(nn.Module(), q, q, q, None, position_bias=bias, is_causal=False)
    found.add_tap(f"{path}:probs", TapStage.OBSERVE, same, lambda: False)
    with refused:
        found.attention(path)(nn.Module(), q, q, q, None, position_bias=bias, is_causal=False)


@pytest.mark.parametrize("kind", ["boolean", "additive", "missing"])
def test_masks(kind):
    scores = torch.randn(1, 1, 2, 3)
    keep = torch.tensor([[True, True, False], [True, True, True]])[None, None]
    mask = {"boolean": keep, "additive": torch.where(keep, 0.0, -torch.inf), "missing": None}[kind]
    found = torch.softmax(masked(scores, mask, causal=kind == "missing"), -1)
    # Two queries are the last two of three positions, so that the causal mask equals `keep`.
    torch.testing.assert_close(found, torch.softmax(scores.masked_fill(~keep, -torch.inf), -1))


def test_one_query_sees_every_key():
    scores = torch.randn(1, 1, 1, 4)
    assert masked(scores, None, causal=True) is scores


def test_model_outside_the_attention_interface(family_model, batch_of, instrumented):
    """DeBERTa computes its attention itself: its weights can be quantized, its attention cannot."""
    model = family_model("deberta")
    found = instrumented(model)
    with pytest.raises(ModelError, match="DebertaV2ForSequenceClassification does not follow transformers' attention"):
        found.attention(found.map.attention[0] if found.map.attention else "deberta.encoder.layer.0.attention.self")
