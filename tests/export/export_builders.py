"""Tiny models of several families, quantized with the host's own quantizer, as export records."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.export.folder import REFERENCE, write_sums
from qpipe.export.record import ActivationSite, ExportRecord, PackedWeight, decoded_sha256
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.tensor import QTensor

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60}
DECODER = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 16}


def make(family: str) -> nn.Module:
    torch.manual_seed(7)
    models = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, max_position_embeddings=32, num_labels=3)),
        "distilbert": lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=60, max_position_embeddings=32)
        ),
        "roberta": lambda: RobertaForSequenceClassification(
            RobertaConfig(**TEXT, max_position_embeddings=40, num_labels=1)
        ),
        "vit": lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=8,
                patch_size=4,
                num_labels=3,
            )
        ),
        "resnet": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=False)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=True)),
    }
    model = models[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms off their initial constants
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def inputs_of(family: str) -> dict[str, Tensor]:
    torch.manual_seed(11)
    if family in ("vit", "resnet"):
        side = 8 if family == "vit" else 32
        return {"pixel_values": torch.randn(3, 3, side, side)}
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(5, 60, (3, 10)), "attention_mask": mask}


def quantize(weight: Tensor, dtype: torch.dtype = torch.float32, **options) -> QTensor:
    quantizer = UniformWeight(UniformOptions(**options))
    quantizer.context.scale_dtype = dtype
    with torch.no_grad():
        return quantizer.encode(weight.detach())


def midrise(weight: Tensor, bits: int, granularity: str) -> QTensor:
    """`(q + 1/2) * scale`, the grid without a zero."""
    peak = weight.abs().amax() if granularity == "tensor" else weight.abs().amax(1, keepdim=True)
    scale = (peak / 2 ** (bits - 1)).reshape(-1, 1).detach()
    codes = torch.floor(weight.detach() / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return QTensor(codes, scale, torch.full((1,), -0.5), bits)


def ternary(weight: Tensor) -> QTensor:
    flat = weight.detach().reshape(weight.shape[0], -1)
    shape = (-1, *[1] * (weight.ndim - 1))
    scale = flat.abs().mean(1).reshape(shape)
    return QTensor((weight.detach() / scale).round().clamp(-1, 1), scale, torch.zeros(1), 2)


def packed(model: nn.Module, module: str, tensor: QTensor, dtype: torch.dtype) -> PackedWeight:
    kind = type(model.get_submodule(module)).__name__
    return PackedWeight(module, kind, tensor, decoded_sha256(tensor, dtype))


def hook_activation(model: nn.Module, site: ActivationSite) -> UniformActivation:
    """Quantize an activation of the reference model as the host does while training."""
    given = site.range
    options = ActivationOptions(
        bits=given.bits, dynamic=given.dynamic, granularity=given.granularity, symmetric=given.symmetric
    )
    quantizer = UniformActivation(options)
    if not given.dynamic:
        quantizer.scale.fill_(given.scale)
        quantizer.zero_point.fill_(given.zero_point or 0.0)
    module = model.get_submodule(site.module)
    if site.slot == "input":
        module.register_forward_pre_hook(lambda _, args: (quantizer(args[0]), *args[1:]))
    else:
        module.register_forward_hook(lambda _, args, output: quantizer(output))
    return quantizer


def record_of(family, tensors, dtype=torch.float32, activations=(), tied=None, metadata=None, tokenizer=None):
    """A record of a family with these `QTensor`s by module path; the reference comes from a separate float model."""
    model, reference = make(family), make(family)
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.data = parameter.data.to(dtype)  # rotary frequencies stay float32, as in from_pretrained
    weights = {f"{m}.weight": packed(model, m, t, dtype) for m, t in tensors.items()}
    tied = dict(tied or {})
    state = {k: v.clone() for k, v in model.state_dict().items() if k not in weights and k not in tied}
    with torch.no_grad():
        for name, weight in weights.items():
            reference.get_parameter(name).copy_(weight.tensor.decode(dtype))
        for site in activations:
            hook_activation(reference, site)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(family).items()}
        logits = reference(**inputs).logits
    examples = {**{f"inputs.{k}": v for k, v in inputs.items()}, "logits": logits.contiguous()}
    about = {"base_model": f"tiny/{family}", "task": "demo", "metrics": {"accuracy": 0.5}, **(metadata or {})}
    return ExportRecord(model, dtype, weights, list(activations), state, tied, tokenizer, about, examples)


def linears(model: nn.Module, *skip: str) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith(skip or ("\0",))]


def embeddings(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Embedding]


def copy_with_wrong_logits(source: Path, target: Path) -> Path:
    """A copy whose recorded logits are off by little and whose checksums are right."""
    shutil.copytree(source, target)
    reference = load_file(target / REFERENCE)
    reference["logits"] = reference["logits"] + 1e-5
    save_file(reference, target / REFERENCE)
    write_sums(target)
    return target
