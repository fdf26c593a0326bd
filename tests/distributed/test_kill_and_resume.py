"""A run killed with SIGKILL at random steps and resumed ends in the bits of one that was never interrupted.

Among them are ranges of activations that were learned or calibrated on two processes, orders of features, and what
the export holds of both. The teacher intervenes in a training of its own; one kill comes in it, one after it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from qpipe.config import dump
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash

STEPS, INTERVENED = 40, 20
RANGES = [
    {"site": "{block}.*query:input", "quantizer": "lsq+-activation", "options": {"bits": 4}},
    {
        "site": "{block}.*output.dense:input",
        "quantizer": "uniform-activation",
        "options": {"granularity": "tensor", "dynamic": False},
    },
]
"""One that is learned, and one that is calibrated on the wrapped model."""


def command(config, out, *more):
    return [sys.executable, "-m", "qpipe.cli", "launch", str(config), "--cpus", "2", "--out", str(out), *more]


def steps_logged(out):
    path = out / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)


def kill_at(process, out, step, timeout=240):
    """SIGKILL the launcher and all its workers as soon as `step` has been logged."""
    deadline = time.time() + timeout
    while steps_logged(out) < step:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.time() < deadline, "training did not get there in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "zero", "precision", "teacher"),
    [
        ("deepspeed", 3, "bfloat16", "named"),
        pytest.param("deepspeed", 2, "float32", "fine-tuned", marks=pytest.mark.slow),
        pytest.param("accelerate", 1, "float32", "fine-tuned", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, engine, zero, precision, teacher):
    seed = random.SystemRandom().randrange(1000)
    kills = [random.SystemRandom().randrange(*steps) for steps in ((6, INTERVENED - 2), (INTERVENED + 6, STEPS - 3))]
    config = tiny_config(
        tmp_path,
        {
            "kure": {"skip_above": None},
            "ti-g": {"two_step": True, "steps": INTERVENED},
            "peg": {"groups": 4, "learned": True},
        },
        quantization__rules=RANGES,
        export__format="native",
        teacher__name=str(tmp_path / "teacher") if teacher == "named" else None,
        train__max_steps=STEPS,
        train__keep_best=True,
        train__eval_every=5,
        train__save_every=5,
        train__keep_checkpoints=2,
        train__dropout=0.1,
        engine__name=engine,
        engine__zero=zero,
        engine__precision=precision,
        seed=seed,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(config))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(path, whole), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for number, step in enumerate(kills):
        words = command(path, killed, *(["--resume"] if number else []))
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        kill_at(process, killed, step)
        assert not (killed / "results.json").exists(), "the run ended before it was killed"
    done = subprocess.run(command(path, killed, "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "resuming after step" in done.stdout + done.stderr
    assert weights_hash(killed) == weights_hash(whole), f"seed {seed}, killed at steps {kills}"
    state, layout = (load_file(whole / "model" / "quantizers.safetensors"), described(whole))
    again = load_file(killed / "model" / "quantizers.safetensors")
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    assert layout == described(killed)
    grouped = [entry for entry in layout if entry["granularity"] == "group"]
    assert len(grouped) == 6 and all(entry["order"] != sorted(entry["order"]) for entry in grouped)
    for entry in grouped:
        order = state[f"{entry['module']}:{entry['slot']}/order"]
        assert entry["order"] == order.tolist()
    assert len(layout) > len(grouped) + 2 and json.loads((whole / "results.json").read_text())["verified"]


def described(out):
    """Activations of the export."""
    return json.loads((out / "export" / "quantization.json").read_text())["activations"]
