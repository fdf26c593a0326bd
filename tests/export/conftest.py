"""Checkpoints written once per session and verified together, because a fresh process takes seconds to start."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import export_builders as builders

from qpipe import ActivationRange
from qpipe.export import compressed, native
from qpipe.export.record import ActivationSite
from qpipe.export.verify import verify_all

GRIDS = [
    {"bits": 8},
    {"bits": 4, "granularity": "group", "group_size": 16},
    {"bits": 3, "symmetric": False},
    {"bits": 2, "granularity": "tensor"},
    {"bits": 4, "granularity": "group", "group_size": 8, "symmetric": False},
    {"bits": 3, "granularity": "tensor", "symmetric": False},
    {"bits": 8, "symmetric": False},
    {"bits": 3},
]


def weight_of(family: str, module: str) -> torch.Tensor:
    return builders.make(family).get_submodule(module).weight.detach()


def uniform(family, modules, grids, dtype=torch.float32):
    model = builders.make(family)
    return {
        name: builders.quantize(model.get_submodule(name).weight, dtype, **grids[i % len(grids)])
        for i, name in enumerate(modules)
    }


def token(module, **changes):
    fields = {"bits": 8, "dynamic": True, "granularity": "token", "symmetric": True, **changes}
    return ActivationSite(module, fields.pop("slot", "input"), ActivationRange(**fields))


def build_records():
    families = ("bert", "distilbert", "roberta", "vit", "llama", "qwen3")
    linear = {f: builders.linears(builders.make(f)) for f in families}
    embedding = {f: builders.embeddings(builders.make(f)) for f in families}
    bf16 = torch.bfloat16
    distil = uniform("distilbert", linear["distilbert"], GRIDS, bf16)
    words = "distilbert.embeddings.word_embeddings"
    distil[words] = builders.quantize(weight_of("distilbert", words), bf16, bits=8)
    grids = {}
    for i, name in enumerate(linear["roberta"]):
        weight = weight_of("roberta", name)
        kinds = [(1, "tensor"), (3, "channel"), (7, "channel"), (8, "tensor"), (1, "channel"), (8, "channel")]
        grids[name] = builders.ternary(weight) if i % 7 == 6 else builders.midrise(weight, *kinds[i % 7])
    llama = uniform("llama", [n for n in linear["llama"] if n != "lm_head"], GRIDS)
    static = {"dynamic": False, "granularity": "tensor", "symmetric": False, "scale": 0.03125, "zero_point": -7.0}
    bert_sites = [token(n, granularity="tensor", symmetric=bool(i % 2)) for i, n in enumerate(linear["bert"]) if i < 6]
    bert_sites += [token(linear["bert"][6], **static), token(linear["bert"][7], slot="output")]
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    qwen = uniform("qwen3", ["model.embed_tokens"], [{"bits": 4}], bf16)
    qwen |= uniform("qwen3", [n for n in linear["qwen3"] if n != "lm_head"], GRIDS[:2], bf16)
    # As a run packs them: both modules store a byte a code, as it is.
    bytes_of_embedding = {
        name: replace(tensor, codes=tensor.codes.to(torch.int8))
        for name, tensor in uniform("qwen3", ["model.embed_tokens"], [{"bits": 8, "symmetric": False}]).items()
    }
    make = builders.record_of
    return {
        "bert": make("bert", uniform("bert", [*linear["bert"], *embedding["bert"]], GRIDS), activations=bert_sites),
        "distilbert": make("distilbert", distil, bf16),
        "roberta": make("roberta", grids),
        "vit": make("vit", uniform("vit", linear["vit"], GRIDS)),
        "llama": make("llama", llama, activations=[token(n) for n in llama]),
        "qwen3-tied": make("qwen3", {n: t for n, t in qwen.items() if "embed" not in n}, bf16, tied=ties),
        "qwen3-asymmetric": make("qwen3", bytes_of_embedding, tied=ties),
        "qwen3": make("qwen3", qwen, bf16, tied=ties, metadata={"licence": "apache-2.0", "plugins": {"x": "1.0"}}),
    }


def build_native():
    conv = "vit.embeddings.patch_embeddings.projection"
    vit = uniform("vit", builders.linears(builders.make("vit")), GRIDS)
    vit[conv] = builders.quantize(weight_of("vit", conv), bits=4, symmetric=False)
    convolutions = [n for n, m in builders.make("resnet").named_modules() if type(m).__name__ == "Conv2d"]
    resnet = uniform("resnet", convolutions, [{"bits": 4}, {"bits": 8}, {"bits": 3, "granularity": "tensor"}])
    words = "bert.embeddings.word_embeddings"
    bert = {n: builders.ternary(weight_of("bert", n)) for n in builders.linears(builders.make("bert"))}
    bert[words] = builders.midrise(weight_of("bert", words), 2, "channel")
    bert["bert.pooler.dense"] = builders.quantize(weight_of("bert", "bert.pooler.dense"), bits=4, granularity="tensor")
    return {
        "native-resnet": builders.record_of("resnet", resnet, metadata={"attention": "sdpa"}),
        "native-vit": builders.record_of("vit", vit),
        "native-bert": builders.record_of("bert", bert, activations=[token("bert.encoder.layer.0.output.dense")]),
    }


@pytest.fixture(scope="session")
def records():
    return {**build_records(), **build_native()}


@pytest.fixture(scope="session")
def exported(records, tmp_path_factory):
    """Folders by name; do not change them, copy them."""
    root = tmp_path_factory.mktemp("exports")
    for name, record in records.items():
        if name.startswith("native"):
            native.write(record, root / name)
        else:
            compressed.write(record, root / name, max_shard=20_000 if name == "llama" else 2**30)
    return {name: root / name for name in records}


@pytest.fixture(scope="session")
def verified(exported, tmp_path_factory):
    """Results by name, and of a copy of `vit` whose recorded logits were changed, under `wrong-logits`."""
    wrong = builders.copy_with_wrong_logits(exported["vit"], tmp_path_factory.mktemp("wrong") / "vit")
    folders = {**exported, "wrong-logits": wrong}
    return dict(zip(folders, verify_all(list(folders.values())), strict=True))
