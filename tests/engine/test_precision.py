"""`engine.precision: auto` takes bfloat16 where the processor is faster in it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from qpipe import FormatError
from qpipe.config import EngineConfig
from qpipe.engine import base, connect
from qpipe.engine.base import resolve_precision
from qpipe.host import load_plugins
from qpipe.stages import execute, teacher
from qpipe.stages.build import build
from qpipe.stages.prepare import prepare
from qpipe.testing import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "AMD EPYC 9R45", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC 7R13", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_follows_the_processor(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision(EngineConfig(), CPU) == expected
    for name in ("float32", "bfloat16"):
        assert resolve_precision(EngineConfig(precision=name), CPU) == getattr(torch, name), (
            "what is asked for is taken"
        )


def test_accelerate_launch_does_not_decide_the_precision():
    """Its default configuration may ask for bfloat16, in which evaluations would run too."""
    code = (
        "import torch; from qpipe.config import EngineConfig, TrainConfig; "
        "from qpipe.engine.accelerate import AccelerateEngine; "
        "engine = AccelerateEngine(EngineConfig(cpu=True, precision='float32')); model = torch.nn.Linear(64, 64); "
        "x = torch.randn(8, 64); expected = model(x); optimizer = torch.optim.SGD(model.parameters(), 0.1); "
        "engine.wrap(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), TrainConfig()); "
        "assert torch.equal(model(x), expected)"
    )
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch):
    """On a processor for which `auto` means another one."""
    settings = {"engine__precision": "auto", "train__max_steps": 4, "train__save_every": 2}
    config = tiny_config(tmp_path, {"ti-g": {}}, teacher__name=None, **settings)
    monkeypatch.setattr(base, "bf16_is_native", lambda device: False)
    whole = execute(config.model_copy(update={"out": str(tmp_path / "whole")}))
    execute(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    teacher = tmp_path / "run" / "teacher" / "model" / "model.safetensors"
    fine_tuned = teacher.stat().st_mtime_ns
    monkeypatch.setattr(base, "bf16_is_native", lambda device: True)
    resumed = execute(config, resume=True)
    assert resumed.results["resumed_step"] == 2
    assert teacher.stat().st_mtime_ns == fine_tuned, "the teacher is not fine-tuned again"
    for name, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name


def test_a_teacher_goes_on_in_the_precision_that_it_began_with(tmp_path, monkeypatch):
    """Where the run ended while it was fine-tuned."""
    config = tiny_config(tmp_path, {"ti-g": {}}, teacher__name=None, engine__precision="auto", train__save_every=2)
    found = []

    def interrupted(run, resume):
        found.append((run.config.engine.precision, resume))
        train(run, resume)
        if not resume:
            raise KeyboardInterrupt

    train = teacher.train
    monkeypatch.setattr(teacher, "train", interrupted)
    monkeypatch.setattr(base, "bf16_is_native", lambda device: False)
    with pytest.raises(KeyboardInterrupt):
        execute(config)
    monkeypatch.setattr(base, "bf16_is_native", lambda device: True)
    run = execute(config, resume=True)
    assert found == [("auto", False), ("float32", True)]
    assert run.config.engine.precision == "auto", "the training itself had not begun"


@pytest.mark.parametrize("scale_dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_the_export_could_not_hold_are_refused_before_training(tmp_path, dtype, scale_dtype):
    """A model of float32, which every engine keeps on most CPUs, holds all of them."""

    def built(**changes):
        config = tiny_config(tmp_path, quantization__preset="w4", quantization__scale_dtype=scale_dtype, **changes)
        engine = connect(config.engine)
        engine.dtype = dtype  # as DeepSpeed has it for that precision
        return build(config, load_plugins({}), engine)

    if dtype == torch.float32 or scale_dtype in ("auto", "bfloat16"):
        prepare(built())
        return
    with pytest.raises(
        FormatError, match=f"embeddings:weight and 12 more: {scale_dtype} scales .* bfloat16.*scale_dtype: auto"
    ):
        prepare(built())
    prepare(built(export__format="native"))
    # Of a finished run nothing is refused but the export itself: it may be wanted in another format.
    prepare(built(), trained={})
