"""Every activation of a transformer is reached, under one vocabulary, and nothing else changes."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from qpipe import ModelError, TapStage
from qpipe.builtin.models import Models
from qpipe.builtin.modules import QuantModules
from qpipe.builtin.uniform import UniformQuantizers
from qpipe.export.activations import quantize_activations
from qpipe.model.instrument import Instruments
from qpipe.model.roles import ROLES
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.plan import make_plan
from qpipe.quant.presets import preset_rules
from qpipe.testing.tiny import FAMILIES

KINDS = {kind.name: kind for kind in UniformQuantizers().qpipe_quantizers()}
TRANSFORMERS = [family for family in FAMILIES if family != "resnet"]
BLOCK = {"llama": 15, "qwen3": 15}
"""Sites of a gated block: 13, the second projection, and its product with the first."""
AROUND = {"bert": 5, "ernie": 5, "roberta": 5, "distilbert": 4, "vit": 4, "llama": 3, "qwen3": 3}


def coarse(bits=3):
    return UniformActivation(ActivationOptions(bits=bits, granularity="tensor"))


def planned(found, name):
    """The activation sites of a preset."""
    rules = [("preset", rule) for rule in preset_rules(name)]
    made = make_plan(list(found.sites.values()), rules, KINDS, found.map)
    return [entry.site for entry in made.sites.values() if entry.site.slot != "weight"]


def observe(found, model, batch, names):
    """What passes at sites in one pass, by name."""
    seen = {}
    for name in names:
        found.add_tap(name, TapStage.OBSERVE, lambda x, n=name: seen.setdefault(n, x.detach().clone()) * 0 + x)
    found.context.taps_active = True
    model(**batch)
    found.context.taps_active = False
    return seen


# --- counts -----------------------------------------------------------------------------------------------------------

BASE = {
    # Per block 13: q, k, v, scores, probabilities, context, attention output, its residual sum, LayerNorm output, GELU
    # output, FFN output, its residual sum, LayerNorm output.
    # Around 5: word + type, + position, LayerNorm output; pooler (RoBERTa: hidden layer of the head), logits.
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(), 13 * 12 + 5),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig(), 13 * 12 + 5),
    "ernie": (hf.ErnieForSequenceClassification, hf.ErnieConfig(), 13 * 12 + 5),
    # One more sum: + task.
    "ernie-task": (hf.ErnieForSequenceClassification, hf.ErnieConfig(use_task_id=True), 13 * 12 + 6),
    # Six blocks; there is no type embedding, so word + position is the one sum.
    "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig(), 13 * 6 + 4),
    # Per block 13: the two LayerNorm outputs stand at the inputs, everything else is as in BERT.
    # Around 4: patches, their sum with positions, final LayerNorm, logits.
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(), 13 * 12 + 4),
    # Per block 15: a second projection and the product with it come in. Around 3: embedding, final norm, logits.
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(), 15 * 32 + 3),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(num_hidden_layers=28), 15 * 28 + 3),
    # No pooler; in the head, GELU output, LayerNorm output and logits.
    "bert-mlm": (hf.BertForMaskedLM, hf.BertConfig(), 13 * 12 + 6),
    # No pooler: embeddings and logits are left.
    "bert-tokens": (hf.BertForTokenClassification, hf.BertConfig(), 13 * 12 + 4),
}


@pytest.mark.parametrize("name", BASE)
def test_outputs_of_models_of_their_published_size(name, instrumented):
    cls, config, expected = BASE[name]
    with torch.device("meta"):
        found = instrumented(cls(config))
    sites = planned(found, "a8-outputs")
    assert len(sites) == expected == sum(len(names) for names in found.map.sites.values())
    assert len({site.name for site in sites}) == expected


def test_all_161_quantizers_of_bert_base_run(instrumented):
    """Random weights; every planned quantizer takes part in one forward pass and changes its tensor."""
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig()).eval()
    found = instrumented(model)
    sites = planned(found, "a8-outputs")
    for site in sites:
        found.put(site, coarse(8))
    found.context.visited = {}
    with torch.no_grad():
        model(input_ids=torch.arange(5, 13)[None])
    assert len(sites) == 161 == len(found.context.visited)
    assert all(visit.changed for visit in found.context.visited.values())
    roles = {role: len(names) for role, names in found.map.sites.items()}
    around = {"embedding_sum": 2, "embedding_output": 1, "pooler": 1, "logits": 1}
    per_block = ["query", "key", "value", "scores", "probs", "context", "attention_output", "attention_sum"]
    per_block += ["ffn_input", "ffn_activation", "ffn_output", "ffn_sum", "block_output"]
    assert roles == around | dict.fromkeys(per_block, 12) and roles.keys() <= ROLES.keys()


PER_BLOCK = {"query", "key", "value", "scores", "probs", "context", "attention_output", "attention_sum"}
PER_BLOCK |= {"ffn_input", "ffn_activation", "ffn_output", "ffn_sum"}
GATED = {"ffn_up", "ffn_product"}
EMBEDDED = {"embedding_sum", "embedding_output"}
ROLES_OF = {
    "bert": PER_BLOCK | EMBEDDED | {"block_output", "pooler", "logits"},
    "distilbert": PER_BLOCK | EMBEDDED | {"block_output", "pooler", "logits"},
    "vit": PER_BLOCK | {"patch_embedding", "embedding_sum", "attention_input", "final_output", "logits"},
    "llama": PER_BLOCK | GATED | {"embedding_output", "attention_input", "final_output", "logits"},
}
ROLES_OF |= {"roberta": ROLES_OF["bert"], "ernie": ROLES_OF["bert"], "qwen3": ROLES_OF["llama"]}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_family_has_the_roles_of_its_kind(family, family_model, instrumented):
    assert instrumented(family_model(family)).map.sites.keys() == ROLES_OF[family]


def test_a_model_whose_embedding_hosts_nothing_has_no_roles(instrumented):
    """Gemma scales what it looks up, in a class of its own; its weights can be quantized all the same."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = hf.GemmaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, pad_token_id=0, **sizes)
    found = instrumented(hf.GemmaForSequenceClassification(config))
    assert not found.map.sites and "model.layers.0.mlp.up_proj:weight" in found.sites


@pytest.mark.parametrize("preset", ["a8-inputs", "a8-outputs"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_planned_quantizer_runs(family, preset, family_model, instrumented, batch_of):
    model, batch = family_model(family), batch_of(family, family != "vit")
    found = instrumented(model)
    sites = planned(found, preset)
    # Inputs of six maps (gated: seven) and four operands of attention in each of two blocks.
    inputs = 2 * ((7 if family in BLOCK else 6) + 4)
    assert len(sites) == (inputs if preset == "a8-inputs" else 2 * BLOCK.get(family, 13) + AROUND[family])
    for site in sites:
        found.put(site, coarse(8))
    found.context.visited = {}
    with torch.no_grad():
        model(**batch)
    assert found.context.visited.keys() == {site.name for site in sites}


# --- nothing else changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_hosting_changes_no_value_and_no_gradient(family, family_model, instrumented, batch_of):
    model, batch = family_model(family), batch_of(family, family != "vit")
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    expected = plain(**batch).logits
    expected.square().sum().backward()
    found = instrumented(model)
    for site in planned(found, "a8-outputs"):
        found.put(site, coarse())
    names = list(model.state_dict())
    assert [n for n in names if "quantizer" not in n] == list(plain.state_dict())
    assert not torch.allclose(model(**batch).logits, expected)
    found.context.enabled = False
    logits = model(**batch).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_gradients_reach_every_parameter(family, family_model, instrumented, batch_of):
    model, batch = family_model(family), batch_of(family, family != "vit")
    found = instrumented(model)
    for site in planned(found, "a8-outputs"):
        found.put(site, coarse(8))
    model.train()
    model(**batch).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        if (
            "k_proj.bias" not in name and "key.bias" not in name and "k_lin.bias" not in name
        ):  # shifts every score alike
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_recomputed_blocks_give_the_same_gradients(family, family_model, instrumented, batch_of):
    grads = []
    for recompute in (False, True):
        model, batch = family_model(family), batch_of(family, family != "vit")
        found = instrumented(model)
        for site in planned(found, "a8-outputs"):
            found.put(site, coarse(6))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        for path in found.map.attention:
            module = model.get_submodule(path)
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        model(**batch).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


# --- what the sites are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_sites_of_the_feed_forward_network(family, family_model, instrumented, batch_of):
    """x, h and y of every block: y = h + x after a normalisation, h + the stream where branches normalise first."""
    model, batch = family_model(family), batch_of(family, False)
    found = instrumented(model)
    roles = ("attention_sum", "ffn_input", "ffn_output", "ffn_sum")
    sites = {role: found.map.sites[role] for role in roles}
    assert all(len(names) == len(found.map.blocks) == 2 for names in sites.values())
    seen = observe(found, model, batch, [name for names in sites.values() for name in names])
    residual = "attention_sum" if family in ("vit", "llama", "qwen3") else "ffn_input"
    for layer in (0, 1):
        at = {role: seen[names[layer]] for role, names in sites.items()}
        torch.testing.assert_close(at["ffn_sum"], at["ffn_output"] + at[residual], rtol=0, atol=0)
        norm = model.get_submodule(sites["ffn_input"][layer].rpartition(":")[0])
        torch.testing.assert_close(at["ffn_input"], norm(at["attention_sum"]), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "llama", "qwen3"])
def test_a_stream_is_quantized_for_branch_and_residual(family, family_model, instrumented, batch_of):
    """Against the block's second half written out; `input` of the same normalisation changes the branch alone."""
    results = {}
    for slot in ("stream", "input"):
        model, batch = family_model(family), batch_of(family, False)
        found = instrumented(model)
        path = found.map.sites["attention_sum"][0].rpartition(":")[0]
        sums = observe(found, model, batch, [found.map.sites["attention_sum"][0]])
        quantizer = coarse()
        found.put(found.site(f"{path}:{slot}"), quantizer)
        output = observe(found, model, batch, [found.map.sites["ffn_sum"][0]])
        (before,), (after,) = sums.values(), output.values()
        quantized = quantizer(before).detach()
        plain = family_model(family)
        branch = plain.get_submodule(found.map.blocks[0]).mlp(plain.get_submodule(path)(quantized))
        torch.testing.assert_close(after, branch + (quantized if slot == "stream" else before), rtol=1e-5, atol=1e-5)
        results[slot] = after
    assert not torch.allclose(results["stream"], results["input"], atol=1e-3)


@pytest.mark.parametrize("order", [("stream", "input"), ("input", "stream")])
@pytest.mark.parametrize("family", ["vit", "llama", "qwen3"])
def test_a_stream_and_an_input_of_one_normalisation_are_loaded_as_they_were(
    family, order, family_model, instrumented, batch_of
):
    """The input is quantized after the stream, in whatever order a file lists them."""
    model, batch = family_model(family), batch_of(family, False)
    found = instrumented(model)
    path = found.map.sites["attention_sum"][0].rpartition(":")[0]
    records = []
    for slot, bits in zip(order, (4, 3) if order[0] == "stream" else (3, 4), strict=True):
        quantizer = coarse(bits)
        found.put(found.site(f"{path}:{slot}"), quantizer)
        records.append({"module": path, "slot": slot, **quantizer.describe()._asdict()})
    plain = family_model(family)
    quantize_activations(plain, records)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_gradients_through_a_stream(family_model, instrumented, batch_of):
    """A quantizer that keeps its input for backward sees the value before the change; the identity changes nothing."""

    class Cube(torch.nn.Module):
        def forward(self, x):
            return x**3 / 16

    model, batch = family_model("llama"), batch_of("llama", False)
    found = instrumented(model)
    name = found.map.sites["attention_sum"][0]
    path = name.rpartition(":")[0]
    found.module(found.site(name)).host("stream", Cube())
    seen = {}
    model.get_submodule(path).stream_quantizer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], q=out))
    model(**batch).logits.square().sum().backward()
    assert seen["x"].grad_fn is not None
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    # The same by a finite difference along the gradient.
    direction, step = weight.grad / weight.grad.norm(), 1e-3
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * step)
            losses.append(model(**batch).logits.double().square().sum())
            weight.sub_(direction, alpha=sign * step)
    assert float(losses[0] - losses[1]) / (2 * step) == pytest.approx(float(weight.grad.norm()), rel=2e-2)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_sums_of_embeddings(given, family_model, instrumented, batch_of):
    """LayerNorm's input is Q(word + type) + position; its gradient that of the same written out."""
    model, batch = family_model("bert"), batch_of("bert", False)
    tables = model.bert.embeddings
    ids, position = batch["input_ids"], torch.arange(9)[None]
    kind = torch.tensor([[0] * 4 + [1] * 5] * 2)
    word = tables.word_embeddings(ids)
    if given == "inputs_embeds":
        word = word.detach().clone().requires_grad_()
    else:
        word.retain_grad()
    first = word + tables.token_type_embeddings(kind)
    quantizer = coarse()
    expected = quantizer(first) + tables.position_embeddings(position)
    factor = torch.randn_like(expected)
    (expected * factor).sum().backward()
    wanted = {n: p.grad.clone() for n, p in tables.named_parameters() if p.grad is not None}
    wanted_input = word.grad
    model.zero_grad()

    found, seen = instrumented(model), {}
    found.put(found.site("bert.embeddings.token_type_embeddings:sum"), quantizer)
    found.add_tap("bert.embeddings.LayerNorm:input", TapStage.OBSERVE, lambda x: seen.setdefault("sum", x))
    found.add_tap("bert.embeddings.token_type_embeddings:sum", TapStage.OBSERVE, lambda x: seen.setdefault("first", x))
    found.context.taps_active = True
    inputs = {"input_ids": ids}
    if given == "inputs_embeds":
        inputs = {"inputs_embeds": word.detach().clone().requires_grad_()}
    model(**inputs, token_type_ids=kind)
    assert torch.equal(seen["first"], first) and torch.equal(seen["sum"], expected)
    (seen["sum"] * factor).sum().backward()
    assert wanted.keys() == {n for n, p in tables.named_parameters() if p.grad is not None}
    for name, grad in wanted.items():
        assert torch.equal(tables.get_parameter(name).grad, grad), name
    if given == "inputs_embeds":
        assert torch.equal(inputs["inputs_embeds"].grad, wanted_input)


def test_three_sums_of_embeddings(instrumented):
    """ERNIE with task embeddings: word + type, + position, + task."""
    torch.manual_seed(0)
    config = hf.ErnieConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        use_task_id=True,
    )
    model = hf.ErnieForSequenceClassification(config).eval()
    found = instrumented(model)
    names = found.map.sites["embedding_sum"]
    assert [name.split(".")[-1] for name in names] == [
        "token_type_embeddings:sum",
        "position_embeddings:sum",
        "LayerNorm:input",
    ]
    for name in names[:2]:
        found.put(found.site(name), coarse())
    ids = torch.arange(5, 11)[None]
    seen = observe(found, model, {"input_ids": ids}, [names[2]])
    t = model.ernie.embeddings
    weight = {n: c.weight.detach() for n, c in t.named_children() if isinstance(c, torch.nn.Embedding)}
    q = coarse()
    with torch.no_grad():
        first = q(weight["word_embeddings"][ids] + weight["token_type_embeddings"][0])
        expected = q(first + weight["position_embeddings"][:6]) + weight["task_type_embeddings"][0]
    assert torch.equal(seen[names[2]], expected)


def test_embeddings_that_are_added_in_another_order(family_model, batch_of):
    """A wrong map is noticed in the first pass."""
    model = family_model("bert")
    made = Models().qpipe_model_map(model)
    word, kind, position = made.embeddings
    wrong = replace(made, embeddings=(position, word, kind), sites={"embedding_sum": (f"{word}:sum",)})
    found = Instruments(model, wrong, lambda module: QuantModules().qpipe_quantize_module(module))
    found.put(found.site(f"{word}:sum"), coarse())
    with pytest.raises(ModelError, match="word_embeddings:sum: .*position_embeddings has not been looked up before it"):
        model(**batch_of("bert", False))


def test_raw_scores_are_scaled_after_they_are_quantized(family_model, instrumented, batch_of):
    model, seen = family_model("bert"), {}
    found = instrumented(model)
    path, quantizer = found.map.attention[0], coarse()
    found.put(found.site(f"{path}:raw_scores"), quantizer)
    for slot in ("query", "key", "scores"):
        found.add_tap(f"{path}:{slot}", TapStage.OBSERVE, lambda x, s=slot: seen.setdefault(s, x))
    found.context.taps_active = True
    model(**batch_of("bert", False))
    assert torch.equal(seen["scores"], quantizer(seen["query"] @ seen["key"].transpose(-1, -2)) * 8**-0.5)


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "path"), [("bert", "bert.embeddings.LayerNorm"), ("qwen3", "model.norm")])
def test_weights_of_normalisations(family, path, family_model, instrumented):
    model = family_model(family)
    norm, x = model.get_submodule(path), torch.randn(2, 3, 32)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
    found = instrumented(model)
    site = found.site(f"{path}:weight")
    assert site.by_name and site.shape == (32,)
    kind = KINDS["uniform"]
    found.put(site, kind.build(kind.options(bits=3, granularity="tensor")))
    # Three bits, symmetric: levels are multiples of max / 3.
    quantized = (norm.weight / 0.5).round().detach() * 0.5
    if family == "bert":
        expected = F.layer_norm(x, (32,), quantized, norm.bias, norm.eps)
    else:
        expected = F.rms_norm(x, (32,), quantized, norm.variance_epsilon)
    found_ = norm(x)
    torch.testing.assert_close(found_, expected)
    found_.sum().backward()
    assert norm.weight.grad.shape == (32,) and bool(norm.weight.grad.any()) and "weight" not in vars(norm)
    assert isinstance(norm.weight, torch.nn.Parameter)


def test_a_normalisation_without_weight_has_no_site_for_one(instrumented):
    model = torch.nn.Sequential(torch.nn.LayerNorm(4, elementwise_affine=False))
    assert set(instrumented(model).sites) == {"0:input", "0:output"}


def test_hosted_classes_are_the_same_for_all_modules_and_survive_a_copy(family_model, instrumented, batch_of):
    model = family_model("bert")
    found = instrumented(model)
    for name in (*found.map.sites["ffn_activation"], *found.map.sites["ffn_sum"]):
        found.put(found.site(name), coarse())
    first, second = (model.bert.encoder.layer[i] for i in (0, 1))
    assert type(first.output.LayerNorm) is type(second.output.LayerNorm)
    assert type(first.intermediate.intermediate_act_fn) is type(second.intermediate.intermediate_act_fn)
    assert isinstance(first.output.LayerNorm, torch.nn.LayerNorm)
    batch = batch_of("bert", True)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


def test_gated_normalisations_host_nothing(instrumented):
    """Only a forward pass of one tensor is known to be `weight` times the normalised input."""

    class GatedRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x, gate):
            return x * gate

    assert instrumented(torch.nn.Sequential(GatedRMSNorm())).sites == {}


def test_two_heads_side_by_side(instrumented):
    """A distilled DeiT has one on each of two tokens, and answers with their mean."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.DeiTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    found = instrumented(hf.DeiTForImageClassificationWithTeacher(config)).map.sites
    heads = ("cls_classifier", "distillation_classifier")
    assert found["logits"] == tuple(f"{head}:output" for head in heads)
    assert found["pooler"] == tuple(f"{head}:input" for head in heads)


def test_heads_one_after_the_other(family_model, instrumented):
    found = instrumented(family_model("distilbert")).map.sites
    assert (found["logits"], found["pooler"]) == (("classifier:output",), ("classifier:input",))
