"""A decoder is compared with its teacher in one arithmetic, by what blocks return."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from qpipe.analysis.analyze import Request, measure
from qpipe.analysis.load import source_of
from qpipe.analysis.session import Session
from qpipe.config import resolve
from qpipe.model.reduce import keep_layers
from qpipe.stages.casting import cast
from qpipe.testing import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_of_decoders_are_what_blocks_return(dtype, tmp_path):
    """The first half of a model is at no distance from the whole, though only the whole's last layer is normalised.

    In bfloat16 neither, as rotary frequencies stay in float32 in both.
    """
    whole = tiny_model(tmp_path / "whole", "llama", num_hidden_layers=4)
    half = AutoModelForCausalLM.from_pretrained(whole)
    keep_layers(half, [f"model.layers.{layer}" for layer in range(4)], [0, 1])
    half.save_pretrained(tmp_path / "half")
    shutil.copy(whole / "vocab.txt", tmp_path / "half")
    shutil.copy(whole / "tokenizer_config.json", tmp_path / "half")
    text = tmp_path / "data.jsonl"
    text.write_text((json.dumps({"text": "the movie was great " * 16}) + "\n") * 40)
    config = {
        "model": {"name": str(tmp_path / "half")},
        "task": "causal-lm",
        "data": {"train": str(text), "max_length": 64, "validation_fraction": 0.2},
        "engine": {"name": "accelerate", "precision": "float32", "cpu": True},
        "out": str(tmp_path / "out"),
    }
    source = source_of(resolve(config))
    request = Request(("layers",), examples=2, teacher=str(whole), layer_map=(1, 2))
    session = Session(source, request)
    session.run.engine.dtype = dtype  # as a run that was trained in it has
    cast(session.run.student, session.run)
    found = measure(session)["layers"]
    assert found["hidden_states"]["mse"] == [0, 0, 0] and found["ffn_input"]["mse"] == [0, 0]
    assert min(found["hidden_states"]["power"]) > 0
