"""Loading Hugging Face models, and the maps of known families."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qpipe.builtin.roles import added_embeddings, with_sites
from qpipe.config import ModelConfig
from qpipe.data.locate import locate, locate_model
from qpipe.errors import ModelError
from qpipe.model.attention import attention_paths, recorded_paths
from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.hosts import is_norm
from qpipe.types import ModelMap, Task

logger = logging.getLogger("qpipe.models")

PROJECTIONS = (
    (("query", "key", "value"), ("../output/dense",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj")),
    (("qkv_proj",) * 3, ("o_proj",)),
    (("query_key_value",) * 3, ("dense",)),
    (("Wqkv",) * 3, ("Wo",)),
)
"""Names of the query, key and value projections in an attention module, and of its output projection. One name three
times is one module for all."""

IMAGE_STATISTICS = frozenset({"image_mean", "image_std"})
"""Keys of `model.config` that are for the image processor: transformers' own models take no such arguments."""


class Models(Plugin):
    """Hugging Face models by task."""

    @hookimpl(trylast=True)
    def qpipe_load_model(self, spec: ModelConfig, task: Task, num_labels: int, strict: bool) -> nn.Module | None:
        """`AutoModelFor...from_pretrained` in float32, or `from_config` where the weights are to be random.

        Raises:
            ConfigError: the name can only be a path, and there is none.
            ModelError: the model does not load, or has no trained head though it must.
        """
        import transformers

        classes = {
            "classification": transformers.AutoModelForSequenceClassification,
            "regression": transformers.AutoModelForSequenceClassification,
            "image-classification": transformers.AutoModelForImageClassification,
            "causal-lm": transformers.AutoModelForCausalLM,
            "masked-lm": transformers.AutoModelForMaskedLM,
            "intent-slot": transformers.AutoModelForTokenClassification,
        }
        overrides: dict[str, Any] = {k: v for k, v in spec.config.items() if k not in IMAGE_STATISTICS}
        if num_labels and not strict:
            overrides["num_labels"] = num_labels
        if task.kind == "regression":
            overrides["problem_type"] = "regression"
        load = _drawn if spec.weights == "random" else _pretrained
        locate_model(spec.name, "model")
        try:
            model, missing = load(classes[task.kind], spec, overrides)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last: sizes that mismatch
            advice = "Give a folder, a hub name, or package:NAME/PATH"
            if isinstance(error, TypeError) and spec.config:  # transformers passes unknown keys to the constructor
                advice = "model.config takes the keys of the model's configuration"
            raise ModelError(
                f"model {spec.name!r} does not load for task kind {task.kind!r}: {error}. {advice}"
            ) from error
        for name in IMAGE_STATISTICS & spec.config.keys():  # so that the saved model says how its images are prepared
            setattr(model.config, name, spec.config[name])
        if strict:
            refuse_untrained(spec.name, model, missing, num_labels)
        return model

    @hookimpl(trylast=True)
    def qpipe_model_map(self, model: nn.Module) -> ModelMap | None:
        """Maps of transformers models, from transformers' own records and the usual names of projections."""
        if not hasattr(model, "base_model_prefix"):
            return ModelMap()
        attention = attention_paths(model)
        inputs, outputs = projections(model, attention)
        prefix = f"{model.base_model_prefix}."
        modules = dict(model.named_modules())
        head = tuple(n for n, m in modules.items() if n and not m._modules and not (n + ".").startswith(prefix))
        words = _input_embedding(model)
        embedding = next((n for n, m in modules.items() if m is words and isinstance(m, nn.Embedding)), None)
        norms = tuple(n for n, m in modules.items() if is_norm(m))
        found = ModelMap(
            blocks=recorded_paths(model, "hidden_states"),
            attention=attention,
            attention_inputs=inputs,
            attention_output=outputs,
            embedding=embedding,
            head=tuple(n for n in head if n not in norms and next(modules[n].parameters(), None) is not None),
            norms=norms,
            embeddings=added_embeddings(model, embedding),
        )
        return with_sites(model, found)


def _pretrained(auto: Any, spec: ModelConfig, overrides: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """A model with the weights of its checkpoint, and the names of those that the checkpoint lacks."""
    resized = {"ignore_mismatched_sizes": True} if "num_labels" in overrides else {}  # the head's, see below
    model, info = auto.from_pretrained(
        locate(spec.name),
        revision=spec.revision or "main",
        trust_remote_code=spec.trust_remote_code,
        dtype="float32",
        output_loading_info=True,
        **resized,
        **overrides,
    )
    body = f"{model.base_model_prefix}."
    other = sorted(entry for entry in info["mismatched_keys"] if entry[0].startswith(body))
    if other:
        key, there, here = other[0]
        raise ValueError(f"{key} has shape {tuple(there)} in the checkpoint and {tuple(here)} in the model")
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(body))
    if lacking:
        logger.warning(
            "%r has no weights for %d parameters of the model itself, such as %s, which begin at random",
            spec.name, len(lacking), lacking[0],
        )  # fmt: skip
    return model, sorted(info["missing_keys"])


def _drawn(auto: Any, spec: ModelConfig, overrides: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """A model with the random weights of its architecture, and the names of all of them: none is trained."""
    from transformers import AutoConfig

    hub: dict[str, Any] = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
    config, unknown = AutoConfig.from_pretrained(locate(spec.name), return_unused_kwargs=True, **hub, **overrides)
    if unknown:
        raise ValueError(f"its configuration has no {min(unknown)!r}, which model.config gives")
    model = auto.from_config(config, dtype=torch.float32, trust_remote_code=spec.trust_remote_code)
    return model, sorted(name for name, _ in model.named_parameters())


def refuse_untrained(name: str, model: Any, missing: list[str], num_labels: int) -> None:
    """Refuse a model whose head would be random or answers another question.

    Args:
        name: what the configuration calls it.
        model: as loaded.
        missing: weights that the checkpoint lacks.
        num_labels: size of the student's head; 0 for language models.

    Raises:
        ModelError: weights are missing, or the numbers of labels differ.
    """
    if missing:
        raise ModelError(
            f"model {name!r} lacks weights, such as {missing[0]}: it was not fine-tuned for this task; "
            "give one that was (without teacher.name, a run fine-tunes its teacher itself)"
        )
    found = getattr(model.config, "num_labels", num_labels)
    if num_labels and found != num_labels:
        raise ModelError(f"model {name!r} has {found} labels, the data {num_labels}; give a model of this task")


def _input_embedding(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def projections(
    model: nn.Module, attention: tuple[str, ...]
) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """Paths of the q, k, v projections and of the output projection of each attention module; empty if unknown."""
    modules = dict(model.named_modules())
    inputs, outputs = [], []
    for path in attention:
        parent = path.rpartition(".")[0]
        for names, candidates in PROJECTIONS:
            if f"{path}.{names[0]}" not in modules:
                continue
            spots = [c.replace("../", f"{parent}/") if c.startswith("../") else f"{path}/{c}" for c in candidates]
            found = [s.replace("/", ".") for s in spots if s.replace("/", ".") in modules]
            if found:
                inputs.append((f"{path}.{names[0]}", f"{path}.{names[1]}", f"{path}.{names[2]}"))
                outputs.append(found[0])
                break
    return (tuple(inputs), tuple(outputs)) if len(inputs) == len(attention) else ((), ())
