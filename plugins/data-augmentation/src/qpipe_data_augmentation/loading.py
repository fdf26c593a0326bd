"""From options to a source of candidates; whatever is wrong with files and models is found here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from qpipe import ConfigError, ModelError, locate
from qpipe_data_augmentation.lexicons import read_pairs, read_wordnet
from qpipe_data_augmentation.masked import MaskedLM
from qpipe_data_augmentation.options import AugmentationOptions
from qpipe_data_augmentation.sentences import Neighbours
from qpipe_data_augmentation.vectors import read_vectors

LONGEST = 512
CHOOSE = (
    "Name a masked language model with data-augmentation.model, or set data-augmentation.one_piece: neighbours, "
    "which needs none"
)


def nothing(word: str, count: int) -> list[str]:
    """No neighbours: words of several tokens stay."""
    return []


def load_neighbours(options: AugmentationOptions) -> Neighbours:
    """What gives the neighbours of a word.

    Raises:
        ConfigError: no file is named.
        DataError: the file is missing or damaged.
    """
    if options.neighbours == "none":
        return nothing
    if options.neighbours_from is None:
        raise ConfigError(
            f"data-augmentation.neighbours is {options.neighbours!r}, but data-augmentation.neighbours_from names no "
            "file: vectors in GloVe's text format, or with neighbours: wordnet or ppdb such a lexicon; with "
            "neighbours: none words of several tokens stay as they are"
        )
    if options.neighbours == "wordnet":
        return read_wordnet(options.neighbours_from)
    if options.neighbours == "ppdb":
        return read_pairs(options.neighbours_from)
    return read_vectors(options.neighbours_from, options.vectors_limit)


def load_tokenizer(name: str, masked: bool, **hub: Any) -> Any:
    """The tokenizer of a model, with a mask token if it is to be used as a masked language model.

    Args:
        name: hub name, folder or `package:` path.
        masked: whether words will be masked.
        hub: `revision` and `trust_remote_code`.

    Raises:
        ConfigError: there is none.
        ModelError: it has no mask token.
    """
    try:
        # Byte-level tokenizers join words of a list without this; others ignore it.
        tokenizer = AutoTokenizer.from_pretrained(locate(name), add_prefix_space=True, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = f"no tokenizer can be loaded from {name!r} ({type(error).__name__}: {error})"
        raise ConfigError(f"{why}. {CHOOSE}" if masked else f"{why}. Set data-augmentation.model") from error
    if masked and tokenizer.mask_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no mask token, so it is of no masked language model. {CHOOSE}")
    return tokenizer


def require_masked_lm(name: str, **hub: Any) -> None:
    """Refuse what cannot be a masked language model, without loading weights.

    Raises:
        ModelError: transformers has no masked language model of this architecture.
    """
    try:
        config = AutoConfig.from_pretrained(locate(name), **hub)
    except (OSError, ValueError, KeyError) as error:
        why = f"no model can be loaded from {name!r} ({type(error).__name__}: {error})"
        raise ConfigError(f"{why}. {CHOOSE}") from error
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and not hub.get("trust_remote_code"):
        raise ModelError(f"{name!r} is a {config.model_type} model, which cannot predict masked words. {CHOOSE}")


def load_masked_lm(name: str, options: AugmentationOptions, device: torch.device, **hub: Any) -> MaskedLM:
    """A masked language model in float32 and evaluation mode.

    Raises:
        ModelError: it has no head or no mask token, or its tokenizer is another model's.
    """
    tokenizer = load_tokenizer(name, masked=True, **hub)
    require_masked_lm(name, **hub)
    model, about = AutoModelForMaskedLM.from_pretrained(
        locate(name), dtype=torch.float32, output_loading_info=True, **hub
    )
    missing = sorted(about["missing_keys"])
    if missing:
        raise ModelError(
            f"{name!r} has no head for masked language modelling: {len(missing)} of its weights are not in the "
            f"checkpoint ({', '.join(missing[:3])}). {CHOOSE}"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, more than the model's "
            f"{model.get_input_embeddings().num_embeddings}: it belongs to another model. {CHOOSE}"
        )
    limit = min(LONGEST, tokenizer.model_max_length, _positions(model))
    return MaskedLM(
        model.eval().to(device), tokenizer, limit, device, options.batch_size, special=options.special_tokens
    )


def _positions(model: Any) -> int:
    """The longest input that the model has positions for; RoBERTa's begin after that of padding."""
    positions = int(getattr(model.config, "max_position_embeddings", LONGEST))
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - int(module.padding_idx) - 1
    return positions


def content(name: str | None) -> str | None:
    """Hash of a file, or of the files directly in a folder; the name itself for what is only on the hub."""
    if name is None:
        return None
    path = Path(locate(name))
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return name
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(f"{file.name}:{hashlib.file_digest(handle, 'sha256').hexdigest()};".encode())
    return total.hexdigest()
