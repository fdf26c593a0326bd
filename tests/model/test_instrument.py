"""Sites, taps and signals of every family."""

import pytest
import torch
import transformers

from qpipe import ModelError, ModelMap, QuantModule, SiteError, TapStage
from qpipe.builtin.models import Models
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.model.attention import SLOTS
from qpipe.model.instrument import Instruments
from qpipe.model.reduce import keep_layers
from qpipe.model.taps import Tap, add_sorted, run_taps
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.quantizer import QuantContext
from qpipe.testing.tiny import FAMILIES

EXPECTED = {
    # maps (linear, convolutional, embeddings), embeddings among them, blocks, attention modules, modules of the head,
    # normalisations, activation functions, sites that only the map tells: sums; streams and outputs of parts
    "bert": (17, 3, 2, 2, 1, 5, 3, 1),
    "roberta": (17, 3, 2, 2, 2, 5, 2, 1),
    "ernie": (17, 3, 2, 2, 1, 5, 3, 1),
    "distilbert": (16, 2, 2, 2, 2, 5, 2, 0),
    "vit": (14, 0, 2, 2, 1, 5, 2, 2 * 2 + 1),
    "llama": (16, 1, 2, 2, 1, 5, 2, 2 * 2),
    "qwen3": (16, 1, 2, 2, 1, 5 + 2 * 2, 2, 2 * 2),
    "resnet": (7, 0, 0, 0, 1, 0, 5, 0),
}


def test_every_family_is_counted():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites(family, family_model, instrumented):
    model = family_model(family)
    found = instrumented(model)
    hosts, embeddings, blocks, attention, head, norms, functions, mapped = EXPECTED[family]
    kinds = [type(m).__name__ for m in model.modules() if type(m).__name__ in ("Linear", "Conv2d", "Embedding")]
    assert len(kinds) == hosts and kinds.count("Embedding") == embeddings
    slots = [site.slot for site in found.sites.values()]
    plain = [site.slot for site in found.sites.values() if not site.by_name]
    assert plain.count("weight") == plain.count("output") == hosts
    assert plain.count("input") == hosts - embeddings
    assert all(slots.count(slot) == attention for slot in SLOTS)
    assert slots.count("weight") == hosts + norms and slots.count("input") == hosts - embeddings + norms
    assert len(slots) == 3 * hosts - embeddings + 7 * attention + 3 * norms + functions + mapped
    assert (len(found.map.blocks), len(found.map.attention), len(found.map.head)) == (blocks, attention, head)
    for name, site in found.sites.items():
        module = model.get_submodule(site.path)
        assert site.name == name and site.module_type == type(module).__name__
        assert site.shape == (tuple(module.weight.shape) if site.slot == "weight" else ())


BERT_NAMES = ("self.query", "self.key", "self.value", "output.dense")
SHORT_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = {
    # attention of a block, and within it the projections to query, key, value and output
    "bert": ("bert.encoder.layer.{}.attention", BERT_NAMES),
    "roberta": ("roberta.encoder.layer.{}.attention", BERT_NAMES),
    "ernie": ("ernie.encoder.layer.{}.attention", BERT_NAMES),
    "distilbert": ("distilbert.transformer.layer.{}.attention", ("q_lin", "k_lin", "v_lin", "out_lin")),
    "vit": ("vit.layers.{}.attention", SHORT_NAMES),
    "llama": ("model.layers.{}.self_attn", SHORT_NAMES),
    "qwen3": ("model.layers.{}.self_attn", SHORT_NAMES),
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "resnet"])
def test_projections(family, family_model, instrumented):
    model = family_model(family)
    found = instrumented(model).map
    assert len(found.attention_inputs) == len(found.attention_output) == len(found.attention) == 2
    attention, names = PROJECTIONS[family]
    for layer, (paths, output) in enumerate(zip(found.attention_inputs, found.attention_output, strict=True)):
        assert (*paths, output) == tuple(f"{attention.format(layer)}.{name}" for name in names)
        for path in (*paths, output):
            assert isinstance(model.get_submodule(path), torch.nn.Linear)
            assert path.startswith(found.blocks[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_the_input_embedding(family, family_model, instrumented):
    model = family_model(family)
    path = instrumented(model).map.embedding
    if family in ("vit", "resnet"):
        assert path is None
    else:
        assert model.get_submodule(path) is model.get_input_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_instrumenting_changes_nothing_by_itself(family, family_model, instrumented, batch_of):
    model, batch = family_model(family), batch_of(family, False)
    before, names = model(**batch).logits, list(model.state_dict())
    instrumented(model)
    assert torch.equal(model(**batch).logits, before) and list(model.state_dict()) == names
    assert not any(isinstance(m, QuantModule) for m in model.modules())


def test_putting_a_quantizer_changes_one_class_only(family_model, instrumented):
    model = family_model("bert")
    found = instrumented(model)
    name = "bert.encoder.layer.0.intermediate.dense:weight"
    found.put(found.site(name), UniformWeight(UniformOptions(bits=2)))
    assert [n for n, m in model.named_modules() if isinstance(m, QuantModule)] == [name.removesuffix(":weight")]
    assert list(found.quantizers()) == [name]
    assert found.quantizers()[name].context is found.context


def test_subclasses_host_nothing(instrumented):
    """What a subclass computes in its forward pass is unknown."""

    class Strange(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Strange(2, 2), torch.nn.Linear(2, 2))
    assert {site.path for site in instrumented(model).sites.values()} == {"1"}


def test_unknown_site_suggests_the_nearest(family_model, instrumented):
    found = instrumented(family_model("bert"))
    with pytest.raises(SiteError, match="no site 'clasifier:weight'; did you mean 'classifier:weight'"):
        found.site("clasifier:weight")


def test_a_host_class_must_be_a_quant_module():
    with pytest.raises(ModelError, match="Linear is offered to host 0 but does not derive from qpipe.QuantModule"):
        Instruments(
            torch.nn.Sequential(torch.nn.Linear(1, 1)),
            ModelMap(),
            lambda m: torch.nn.Linear if not m._modules else None,
        )


@pytest.mark.parametrize("name", ["0:stream", "1:output", "0:sum", "0:probs"])
def test_a_map_that_names_sites_the_model_lacks(name):
    with pytest.raises(ModelError, match=f"the model map names a site '{name}' that Sequential does not have"):
        Instruments(torch.nn.Sequential(torch.nn.Linear(1, 1)), ModelMap(sites={"logits": (name,)}), lambda m: None)


# --- taps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["input", "output", "context", "probs"])
def test_taps_run_in_stage_order_whoever_came_first(slot, family_model, instrumented, batch_of):
    model = family_model("bert")
    found, calls = instrumented(model), []
    path = found.map.attention[0] if slot in ("context", "probs") else "bert.encoder.layer.0.output.dense"
    for stage in (TapStage.QUANTIZE, TapStage.OBSERVE, TapStage.REPLACE, TapStage.OBSERVE):
        number = len(found.module(found.site(f"{path}:{slot}")).taps_at(slot))
        found.add_tap(f"{path}:{slot}", stage, lambda x, s=stage, n=number: calls.append((s.name, n)) or x)
    model(**batch_of("bert", False))
    assert calls == [], "taps act within training steps only"
    found.context.taps_active = True
    model(**batch_of("bert", False))
    assert calls == [("OBSERVE", 1), ("OBSERVE", 3), ("REPLACE", 2), ("QUANTIZE", 0)]


def test_a_tap_replaces_and_the_quantizer_comes_last(family_model, instrumented, batch_of):
    model = family_model("bert")
    found, seen = instrumented(model), []
    path = "bert.encoder.layer.0.output.dense"
    found.put(found.site(f"{path}:input"), UniformActivation(ActivationOptions()))
    found.add_tap(f"{path}:input", TapStage.REPLACE, lambda x: torch.full_like(x, 0.3))
    found.quantizers()[f"{path}:input"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found.context.taps_active = True
    model(**batch_of("bert", False))
    assert float(seen[0].min()) == float(seen[0].max()) == pytest.approx(0.3)


def test_weights_have_no_taps(family_model, instrumented):
    found = instrumented(family_model("bert"))
    with pytest.raises(SiteError, match="taps see activations; 'classifier:weight' is a weight"):
        found.add_tap("classifier:weight", TapStage.OBSERVE, lambda x: x)


def test_inactive_taps_are_passed_over():
    context, active, taps = QuantContext(taps_active=True), [False], []
    add_sorted(taps, Tap(TapStage.REPLACE, lambda x: x + 1, lambda: active[0]))
    add_sorted(taps, Tap(TapStage.OBSERVE, lambda x: x * 10))
    assert run_taps(taps, 1, context) == 10
    active[0] = True
    assert run_taps(taps, 1, context) == 11
    context.taps_active = False
    assert run_taps(taps, 1, context) == 1


# --- signals ----------------------------------------------------------------------------------------------------------

ALL = frozenset({"logits", "hidden_states", "scores", "visible", "probs", "context", "attention_output"})


def watched_blocks(model, batch):
    """A model's output; what its first block receives, and what every block returns."""
    passed, handles = [], []
    for number, path in enumerate(Models().qpipe_model_map(model).blocks):
        block = model.get_submodule(path)
        if number == 0:
            handles.append(block.register_forward_pre_hook(lambda m, args: passed.append(args[0])))
        hook = block.register_forward_hook(
            lambda m, args, out: passed.append(out[0] if isinstance(out, tuple) else out)
        )
        handles.append(hook)
    output = model(**batch)
    for handle in handles:
        handle.remove()
    return output, passed


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "resnet"])
def test_signals_of_every_layer(family, family_model, instrumented, batch_of):
    model, batch = family_model(family), batch_of(family, False)
    expected, passed = watched_blocks(model, batch)
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    found, store = instrumented(model), {}
    found.enable_capture()
    found.enable_capture()  # a second call adds no taps
    found.want(ALL, store)
    found.context.taps_active = True
    output = model(**batch, output_hidden_states=True)
    found.take_outputs(output, ALL, store)
    kinds = ("scores", "visible", "probs", "context", "attention_output")
    layers = [(kind, layer) for kind in kinds for layer in (0, 1)]
    assert set(store) == {*layers, ("logits", 0), *(("hidden_states", i) for i in range(3))}
    tokens = maps[0].shape[-1]
    for layer in (0, 1):
        torch.testing.assert_close(store["probs", layer], maps[layer])
        assert store["scores", layer].shape == (2, 4, tokens, tokens)
        assert torch.equal(store["visible", layer].expand(2, 4, -1, -1), maps[layer] > 0)
        assert store["context", layer].shape == (2, tokens, 4, 8)
        assert store["attention_output", layer].shape == (2, tokens, 32)
        projection = model.get_submodule(found.map.attention_output[layer])
        linear = torch.nn.functional.linear(store["context", layer].flatten(2), projection.weight, projection.bias)
        torch.testing.assert_close(store["attention_output", layer], linear)
    torch.testing.assert_close(store["logits", 0], expected.logits, rtol=1e-4, atol=1e-5)
    for layer, hidden in enumerate(passed):
        torch.testing.assert_close(store["hidden_states", layer], hidden, rtol=1e-4, atol=1e-5)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=4, global_attn_every_n_layers=2, cls_token_id=3, sep_token_id=4
    ),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", WINDOWED)
def test_visible_pairs_are_those_that_the_softmax_sees(family, padded, fused, instrumented, batch_of):
    """As transformers' own eager attention has them with sliding windows; without maps too."""
    model = transformers.AutoModelForSequenceClassification.from_config(WINDOWED[family]()).eval()
    batch = batch_of("llama", padded)
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    found, store = instrumented(model), {}
    found.enable_capture()
    found.want(frozenset({"visible"} if fused else {"visible", "probs"}), store)
    found.context.taps_active = True
    model(**batch)
    real = batch["attention_mask"].bool()[:, None, :, None] if padded else torch.tensor(True)
    for layer, expected in enumerate(maps):
        seen = store["visible", layer].expand_as(expected)
        assert torch.equal(seen & real, (expected > 0) & real), layer
    assert any(not store["visible", layer][0, 0, -1, 0] for layer in (0, 1)), "a window is at work"


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "qwen3"])
def test_a_model_cut_short_has_the_hidden_states_of_the_whole(family, family_model, instrumented, batch_of):
    """So its last one too: no normalisation that follows the last block counts as part of it."""
    whole, short = (family_model(family, num_hidden_layers=4) for _ in range(2))
    keep_layers(short, Models().qpipe_model_map(short).blocks, [0, 1])
    stores = []
    kinds = frozenset({"hidden_states"})
    for model in (whole, short):
        found, store = instrumented(model), {}
        found.enable_capture()
        found.want(kinds, store)
        found.context.taps_active = True
        found.take_outputs(model(**batch_of(family, False), output_hidden_states=True), kinds, store)
        stores.append(store)
    assert len(stores[0]) == 5 and len(stores[1]) == 3
    for key, value in stores[1].items():
        assert torch.equal(value, stores[0][key]), key


def test_what_a_block_returns_is_not_kept_outside_training_steps(family_model, instrumented, batch_of):
    model = family_model("llama")
    found, store = instrumented(model), {}
    found.enable_capture()
    found.want(frozenset({"hidden_states"}), store)
    model(**batch_of("llama", False))
    assert not store


def test_only_what_is_wanted_is_captured(family_model, instrumented, batch_of):
    model = family_model("bert")
    found, store = instrumented(model), {}
    found.enable_capture()
    found.context.taps_active = True
    found.want(frozenset({"context"}), store)
    output = model(**batch_of("bert", True))
    found.take_outputs(output, frozenset({"context"}), store)
    assert set(store) == {("context", 0), ("context", 1)}
    found.want(frozenset(), {})
    before = dict(store)
    model(**batch_of("bert", True))
    assert store == before


def test_captured_student_signals_carry_gradients(family_model, instrumented, batch_of):
    model = family_model("bert")
    found, store = instrumented(model), {}
    found.enable_capture()
    found.context.taps_active = True
    found.want(frozenset({"scores"}), store)
    model(**batch_of("bert", True))
    store["scores", 1].square().sum().backward()
    assert float(model.get_submodule(found.map.attention_inputs[1][0]).weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("family", "name"), [("resnet", "ResNetForImageClassification"), ("deberta", "DebertaV2ForSequenceClassification")]
)
def test_a_model_without_known_attention_has_no_maps(family, name, family_model, instrumented):
    found = instrumented(family_model(family))
    found.enable_capture()
    with pytest.raises(
        ModelError, match=f"{name} offers no probs, scores: its attention is not known.*qpipe_model_map"
    ):
        found.want(frozenset({"scores", "probs", "logits"}), {})
    found.want(frozenset({"logits", "hidden_states"}), {})
