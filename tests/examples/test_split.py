"""`examples/binarybert/split.py`: a ternary run becomes a binary model that computes the same, and trains on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import qpipe
from qpipe import QuantContext
from qpipe.export.verify import verify_all
from qpipe.stages import plan_run
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config, tiny_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "binarybert"
BINARY = [
    {"site": "{block}.*:weight", "quantizer": "binary", "options": {"granularity": "tensor"}},
    {"site": "*word_embeddings.*:weight", "quantizer": "binary", "options": {"granularity": "channel"}},
]


@pytest.fixture(scope="module")
def splitting():
    spec = importlib.util.spec_from_file_location("split", EXAMPLE / "split.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, splitting):
    """A ternary run at `run`, and its split model at `split`."""
    folder = tmp_path_factory.mktemp("split")
    config = tiny_config(
        folder, {"ternary-twn": {"embedding": True}}, quantization__preset="a8-inputs", export__format="native"
    )
    qpipe.execute(config)
    splitting.split(folder / "run", folder / "split")
    return folder


def binary_config(folder: Path, out: str, **changes):
    config = tiny_config(
        folder,
        {"distillation": {"preset": "ternarybert"}},
        model__name=str(folder / "split"),
        model__trust_remote_code=True,
        teacher__name=str(folder / "teacher"),
        teacher__init_student=False,
        quantization__preset="a8-inputs",
        quantization__rules=BINARY,
        export__format="native",
        out=str(folder / out),
        **changes,
    )
    return config


def batch(run):
    rows = [run.data.validation[i] for i in range(8)]
    return {k: v for k, v in run.data.collate(rows).items() if k != "labels"}


def test_split_model_computes_what_the_full_precision_one_does(folder):
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "model").eval()
    halves = AutoModelForSequenceClassification.from_pretrained(folder / "split", trust_remote_code=True).eval()
    assert sum(p.numel() for p in halves.parameters()) > 1.5 * sum(p.numel() for p in whole.parameters())
    inputs = batch(restore(folder / "run"))
    with torch.no_grad():
        torch.testing.assert_close(halves(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_binary_model_starts_where_the_ternary_one_ended(folder):
    ternary, binary = restore(folder / "run"), plan_run(binary_config(folder, "planned"))
    names = [name for name, site in binary.plan.sites.items() if site.quantizer == "binary"]
    assert len(names) == 2 * sum(site.quantizer == "ternary-twn" for site in ternary.plan.sites.values())
    inputs = batch(ternary)
    logits = []
    for run in (ternary, binary):
        assert isinstance(run.instruments.context, QuantContext) and run.instruments.context.enabled
        with torch.no_grad():
            logits.append(run.student.eval()(**inputs).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    binary.instruments.context.enabled = False
    with torch.no_grad():
        assert not torch.allclose(binary.student(**inputs).logits, logits[0], atol=1e-3)


def test_it_trains_on_and_is_exported(folder):
    run = qpipe.execute(binary_config(folder, "binary"))
    assert run.results["steps"] == 6
    (verified,) = verify_all([run.out / "export"], trust_remote_code=True)
    assert verified.passed, verified.lines()


def test_bad_input(folder, splitting, tmp_path):
    with pytest.raises(SystemExit, match="exists; name another folder"):
        splitting.split(folder / "run", folder / "split")
    qpipe.execute(tiny_config(tmp_path))
    with pytest.raises(SystemExit, match="no weights of the quantizer ternary-twn"):
        splitting.split(tmp_path / "run", tmp_path / "split")
    roberta = tiny_config(
        tmp_path / "roberta",
        {"ternary-twn": {}},
        model__name=str(tiny_model(tmp_path / "roberta-model", "roberta")),
        quantization__preset=None,
    )
    qpipe.execute(roberta)
    with pytest.raises(SystemExit, match="holds a roberta; only BERT"):
        splitting.split(tmp_path / "roberta" / "run", tmp_path / "split")
