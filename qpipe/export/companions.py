"""What lies beside the weights: configuration, tokenizer, card, licence, metadata and reference logits."""

from __future__ import annotations

import copy
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

import qpipe
from qpipe.errors import FormatError
from qpipe.export.card import render
from qpipe.export.folder import METADATA, REFERENCE, read_json, write_json
from qpipe.export.record import ExportRecord, PackedWeight, decoded_sha256, tensor_sha256, zero_point_kind

FORMAT_VERSION = 1

AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForCausalLM",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModel",
)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def auto_class(model: nn.Module) -> str:
    """Name of the transformers auto class whose `from_pretrained` makes this model.

    Raises:
        FormatError: there is none, so that no stock program could load the export.
    """
    registered = has_code(model)
    if registered in AUTO_CLASSES:
        return registered
    wanted = {base.__name__ for base in type(model).__mro__}
    for name in AUTO_CLASSES:
        offered = getattr(transformers, name)._model_mapping.get(type(model.config), None)
        if offered is not None and any(c.__name__ in wanted for c in _as_tuple(offered)):
            return name
    raise FormatError(
        f"no transformers auto class makes a {type(model).__name__}, so no other program could load the export; "
        "quantize a model that AutoModelFor... loads"
    )


def has_code(model: nn.Module) -> str:
    """Name of the auto class for which a model's own Python code was loaded; empty for those of transformers itself."""
    return getattr(model, "_auto_class", None) or ""


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def plain_class(model: nn.Module) -> Any:
    """The class of a model before qpipe changed it, which its architecture names.

    Raises:
        FormatError: no transformers auto class makes it.
    """
    if has_code(model):
        return type(model)
    offered = getattr(transformers, auto_class(model))._model_mapping.get(type(model.config), None)
    names = {c.__name__ for c in _as_tuple(offered)}
    return next(base for base in type(model).__mro__ if base.__name__ in names)


def _tie_keys(model: nn.Module) -> dict[str, str]:
    keys = getattr(model, "_tied_weights_keys", None)
    return dict(keys) if isinstance(keys, dict) else {}


def is_untied(record: ExportRecord) -> bool:
    """True if the file holds separate values for parameters that the architecture can tie."""
    names = {*record.weights, *record.tensors}
    return any(a in names and b in names for a, b in _tie_keys(record.model).items())


def resolve_ties(record: ExportRecord) -> ExportRecord:
    """Write out parameters that are tied to a quantized one.

    Loaders tie modules by sharing one parameter, which cannot be packed for two kinds of module at once. Such a
    parameter is stored a second time with the same codes, and `tie_word_embeddings` is turned off; the metadata list it
    under `untied`.

    Raises:
        FormatError: a parameter is tied to a name that the record does not hold, or to one that is tied itself.
    """
    weights, tensors, tied = dict(record.weights), dict(record.tensors), dict(record.tied)
    for name, source in record.tied.items():
        if source not in weights and source not in tensors:
            raise FormatError(f"{name} is tied to {source}, which the record holds neither quantized nor as a tensor")
    if not is_untied(record) and not any(name in weights for pair in tied.items() for name in pair):
        return record
    for name, source in tied.items():
        packed = weights.get(source) or weights.get(name)
        if packed is None:
            tensors[name] = tensors[source].clone()
            continue
        for other in (name, source):
            weights.setdefault(other, _second_copy(packed, record.model, other))
            tensors.pop(other, None)
    about = {**record.metadata, "untied": sorted(tied)}
    return replace(record, weights=weights, tensors=tensors, tied={}, metadata=about)


def _second_copy(packed: PackedWeight, model: nn.Module, name: str) -> PackedWeight:
    """The same codes for another module, with tensors of its own: safetensors refuses shared memory."""
    module = name.removesuffix(".weight")
    kind = "Embedding" if isinstance(model.get_submodule(module), nn.Embedding) else "Linear"
    own = {part: getattr(packed.tensor, part).clone() for part in ("codes", "scale", "zero_point")}
    lattice = replace(packed.tensor, **own)
    return replace(packed, module=module, module_type=kind, tensor=lattice)


def model_config(record: ExportRecord) -> Any:
    """A copy of the model's configuration that says how the export is to be loaded."""
    config: Any = copy.deepcopy(record.model.config)
    config.architectures = [plain_class(record.model).__name__]
    config.dtype = record.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if is_untied(record) and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    return config


def save_config(record: ExportRecord, folder: Path) -> None:
    """Write `config.json`, and beside it the Python code of a model that transformers does not have."""
    config = model_config(record)
    if has_code(record.model):
        custom_object_save(record.model, folder, config=config)
    config.save_pretrained(folder)
    keep_labels(config, folder)


def keep_labels(config: Any, folder: Path) -> None:
    """Write the labels into a saved configuration where transformers left them out and would read others.

    It leaves out two labels without names, and a class of another default (BART: three) then takes that.

    Args:
        config: of the model.
        folder: has its `config.json`.
    """
    path = folder / "config.json"
    saved = read_json(path)
    if not getattr(config, "id2label", None) or "id2label" in saved:
        return
    if type(config).from_pretrained(folder).num_labels != config.num_labels:
        saved |= {"id2label": {str(n): name for n, name in config.id2label.items()}, "label2id": dict(config.label2id)}
        write_json(path, saved)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """What decides the last bits of a forward pass: logits are compared exactly where all of it is equal."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model() or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
    }


def metadata(record: ExportRecord, format_name: str, stored: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """The contents of `qpipe.json`.

    Args:
        record: what is exported.
        format_name: of the exporter.
        stored: layout and bits of each stored code, by module.
    """
    weights = {
        name: {
            "module": w.module,
            "module_type": w.module_type,
            "bits": w.tensor.bits,
            "granularity": w.tensor.granularity,
            "group_size": w.tensor.group_size,
            "zero_point": zero_point_kind(w.tensor.zero_point),
            "shape": list(w.tensor.codes.shape),
            "stored": stored[w.module][0],
            "stored_bits": stored[w.module][1],
            "sha256": decoded_sha256(w.tensor, record.dtype),
        }
        for name, w in record.weights.items()
    }
    return {
        **record.metadata,
        "qpipe": qpipe.__version__,
        "format": format_name,
        "format_version": FORMAT_VERSION,
        "auto_class": auto_class(record.model),
        **({"custom_code": True} if has_code(record.model) else {}),
        "dtype": dtype_name(record.dtype),
        "environment": {
            **environment(record.dtype),
            "device": next((p.device.type for p in record.model.parameters()), "cpu"),
            **dict(record.metadata.get("environment", {})),
        },
        "weights": weights,
        "activations": [site.record() for site in record.activations],
        "tensors": {
            name: {"shape": list(t.shape), "dtype": dtype_name(t.dtype), "sha256": tensor_sha256(t)}
            for name, t in record.tensors.items()
        },
    }


def _licence(record: ExportRecord) -> Path | None:
    named = record.metadata.get("license_file")
    if named:
        path = Path(named)
        if not path.is_file():
            raise FormatError(f"the licence file {named} does not exist")
        return path
    base = record.metadata.get("base_model")
    if not base:
        return None
    names = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
    return next((Path(base) / n for n in names if (Path(base) / n).is_file()), None)


def _check(record: ExportRecord) -> None:
    for name, weight in record.weights.items():
        allowed = (decoded_sha256(weight.tensor, record.dtype), tensor_sha256(weight.tensor.decode(record.dtype)))
        if weight.decoded_sha256 not in allowed:
            raise FormatError(f"{name}: decoded_sha256 is not the hash of its decoded codes in {record.dtype}")
    if "logits" not in record.reference or not any(k.startswith("inputs.") for k in record.reference):
        raise FormatError(
            "the record has no reference examples (inputs.* and logits), so the export could not be verified"
        )
    try:
        json.dumps(dict(record.metadata))
    except (TypeError, ValueError) as error:
        raise FormatError(f"the metadata cannot be written as JSON: {error}") from error


def companions(record: ExportRecord, folder: Path, format_name: str, stored: Mapping[str, tuple[str, int]]) -> None:
    """Write everything but weights and configuration into the folder.

    Raises:
        FormatError: the record contradicts itself, its metadata are no JSON, or its licence file is missing.
    """
    _check(record)
    data = metadata(record, format_name, stored)
    generation = getattr(record.model, "generation_config", None)
    if generation is not None and data["auto_class"] == "AutoModelForCausalLM":
        generation.save_pretrained(folder)
    if record.tokenizer is not None:
        record.tokenizer.save_pretrained(folder)
    licence = _licence(record)
    if licence is not None:
        shutil.copyfile(licence, folder / "LICENSE")
    save_file({k: v.detach().cpu().contiguous() for k, v in record.reference.items()}, folder / REFERENCE)
    write_json(folder / METADATA, data)
    card = folder / "README.md"
    inputs = [name.removeprefix("inputs.") for name in record.reference if name.startswith("inputs.")]
    card.write_text(render(data, licence is not None, inputs), encoding="utf-8")
