"""Models of a few kilobytes and data of a few sentences, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from qpipe.config import RunConfig, resolve

GOOD = ("great", "good", "wonderful", "fun", "moving", "funny")
BAD = ("bad", "awful", "terrible", "boring", "dull", "silly")
OTHER = ("the", "a", "movie", "film", "was", "is", "not", "very", "plot", "actor", "and", "story", "scene", "this")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *GOOD, *BAD, *OTHER)


def tiny_text_data(path: Path, examples: int = 160, seed: int = 0) -> Path:
    """Write JSON lines with `sentence` and `label` (1 = positive), learnable from two words of each sentence."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(examples):
            label = rng.randint(0, 1)
            words = rng.choices(OTHER, k=rng.randint(3, 8)) + rng.choices(GOOD if label else BAD, k=2)
            rng.shuffle(words)
            file.write(json.dumps({"sentence": " ".join(words), "label": label}) + "\n")
    return path


def tiny_slot_data(path: Path, examples: int = 160, seed: int = 0) -> Path:
    """Write JSON lines with `tokens`, `slot_tags` and `intent`: praise and blame are slots, and the last is the intent.

    Some words, such as `good-fun`, have several tokens.
    """
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(examples):
            words, tags, intent = [], [], ""
            for _ in range(2):
                intent, choices = rng.choice((("praise", GOOD), ("blame", BAD)))
                plain, slot = rng.choices(OTHER, k=rng.randint(1, 3)), rng.choices(choices, k=rng.randint(1, 2))
                slot[-1] += rng.choice(("", f"-{rng.choice(choices)}"))
                words += plain + slot
                tags += ["O"] * len(plain) + [f"B-{intent}"] + [f"I-{intent}"] * (len(slot) - 1)
            file.write(json.dumps({"tokens": words, "slot_tags": tags, "intent": intent}) + "\n")
    return path


def tiny_lines(path: Path, examples: int = 80, seed: int = 0) -> Path:
    """Write JSON lines with `text`, twelve words each, for language models."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(OTHER, k=12))}) + "\n" for _ in range(examples)))
    return path


def tiny_images(path: Path, examples: int = 48, side: int = 16, seed: int = 0) -> Path:
    """Write a parquet file of bright (label 1) and dark images: `image` with raw channels-first bytes, and `label`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    labels = [i % 2 for i in range(examples)]
    shape = (3, side, side)
    pixels = [rng.integers(100 * y, 100 * y + 150, shape, dtype=np.uint8).tobytes() for y in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pixels, "label": labels}), path)
    return path


def _transformer(family: str, **sizes: Any) -> Any:
    import transformers as hf

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **sizes}
    text = {**common, "vocab_size": len(VOCABULARY), "max_position_embeddings": 66, "pad_token_id": 0}
    decoder = {**text, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    distil = {
        "dim": common["hidden_size"],
        "n_layers": common["num_hidden_layers"],
        "n_heads": common["num_attention_heads"],
        "hidden_dim": common["intermediate_size"],
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 66,
    }
    makers: dict[str, Any] = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**text)),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**text)),
        "ernie": lambda: hf.ErnieForSequenceClassification(hf.ErnieConfig(**text)),
        "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**distil)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**common, image_size=16, patch_size=4)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder, head_dim=8)),
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "deberta": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**text)),
    }
    if family not in makers:
        raise ValueError(f"no tiny model {family!r}; there are {', '.join(makers)}")
    return makers[family]()


FAMILIES = ("bert", "roberta", "ernie", "distilbert", "vit", "llama", "qwen3", "resnet")
"""Families that `tiny_model` makes and qpipe quantizes."""


def tiny_model(folder: Path, family: str = "bert", seed: int = 0, **sizes: Any) -> Path:
    """Write a randomly initialised model (and, for text, a word tokenizer) that `from_pretrained` loads.

    Args:
        folder: where to write it.
        family: one of `FAMILIES`.
        seed: of the weights; the global generator is left as it was.
        sizes: overrides of `hidden_size`, `num_hidden_layers`, ... in the model's configuration.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _transformer(family, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if family not in ("vit", "resnet"):
        from transformers import BertTokenizer

        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(VOCABULARY))
        BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def tiny_config(folder: Path, plugins: dict[str, dict[str, Any]] | None = None, **changes: Any) -> RunConfig:
    """A run of six optimizer steps on one CPU process in float32, without dropout, with a teacher if plugins need one.

    Args:
        folder: gets `model/`, `teacher/`, `data/` and, as run directory, `run/`.
        plugins: options by plugin name.
        changes: `section__key=value` overrides, such as `train__max_steps=2`.
    """
    data = folder / "data" / "train.jsonl"
    if not data.exists():
        tiny_text_data(data)
        tiny_model(folder / "model")
        tiny_model(folder / "teacher", seed=1)
    source: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "task": "sst2",
        "data": {"train": str(data), "max_length": 16, "pad_to_max_length": True, "validation_fraction": 0.2},
        "quantization": {"preset": "w4a8"},
        "train": {
            "max_steps": 6,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "log_every": 1,
            "save_every": 3,
            "eval_every": 6,
            "keep_checkpoints": 9,
            "keep_best": False,
            "dropout": 0.0,
        },
        "engine": {"name": "accelerate", "precision": "float32", "cpu": True},
        "plugins": plugins or {},
        "out": str(folder / "run"),
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return resolve(source, overrides)
