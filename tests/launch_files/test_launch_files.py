"""Every file in `launch/` is read by the program it is for."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qpipe.config import dump
from qpipe.testing import tiny_config

LAUNCH = Path(__file__).parents[2] / "launch"
DEEPSPEED = sorted((LAUNCH / "deepspeed").glob("*.json"))
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def test_all_kinds_are_there():
    assert {path.stem for path in DEEPSPEED} == {"zero1", "zero2", "zero3", "zero3-offload"}
    assert [path.stem for path in ACCELERATE] == ["ddp", "fsdp2"]
    assert [path.stem for path in SCRIPTS] == ["slurm", "two-nodes"]


def test_readme_names_every_file():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.name in text


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_understands(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    from qpipe.config import EngineConfig
    from qpipe.engine.deepspeed import merge_config_file

    stage = int(re.search(r"zero(\d)", path.stem).group(1))
    own = {"train_batch_size": 1, "zero_optimization": {"stage": stage}}
    merged = merge_config_file(own, EngineConfig(zero=stage, config_file=str(path)))
    config = DeepSpeedConfig(merged)
    assert config.zero_optimization_stage == stage
    known = config.zero_config.model_dump(by_alias=True).keys() | config.zero_config.model_dump().keys()
    assert set(json.loads(path.read_text())["zero_optimization"]) <= known
    assert (config.zero_config.offload_param is not None) == ("offload" in path.stem)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_understands(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    config = load_config_from_file(str(path))
    assert config.distributed_type.value == ("FSDP" if path.stem == "fsdp2" else "MULTI_GPU")
    if path.stem == "fsdp2":
        fields = FullyShardedDataParallelPlugin.__dataclass_fields__
        names = (key if key in fields else key.removeprefix("fsdp_") for key in config.fsdp_config)
        assert set(names) <= {*fields, "offload_params"}  # the plugin calls that one cpu_offload
        assert config.fsdp_config["fsdp_version"] == 2
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


@pytest.mark.distributed
@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_launch_trains(path, tmp_path):
    """The command of the README, on two CPU processes: two in place of the file's eight, at a free port, and with
    `engine.cpu: true` in `run.yaml`. `--cpu` is not given: Accelerate would start one process only."""
    config = tiny_config(tmp_path, train__max_steps=2, train__eval_every=2, engine__fsdp=path.stem == "fsdp2")
    (tmp_path / "run.yaml").write_text(dump(config))
    command = re.search(r"^accelerate (launch .*/)ddp(.yaml .*)$", (LAUNCH / "README.md").read_text(), re.M)
    words = shlex.split(command.expand(rf"\1{path.stem}\2"))
    words[1:1] = ["--num_processes", "2", "--main_process_port", "0"]
    assert words[-1] == "run.yaml"
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[:-1], str(tmp_path / "run.yaml")]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=env, cwd=LAUNCH.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2 and results["verified"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert json.loads((checkpoint / "progress.json").read_text())["world_size"] == 2
    assert len(list((checkpoint / "engine").glob("*.distcp"))) == (2 if path.stem == "fsdp2" else 0)


def test_deepspeed_reads_the_hostfile():
    from qpipe.launching.start import hosts

    assert hosts(LAUNCH / "hostfile") == {"node0": 8, "node1": 8}


def test_bad_hostfile(tmp_path):
    from qpipe.errors import ConfigError
    from qpipe.launching.start import hosts

    (tmp_path / "hosts").write_text("node0 8\n")
    with pytest.raises(ConfigError, match="HOST slots=N"):
        hosts(tmp_path / "hosts")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_bash_reads(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


@pytest.fixture
def tools(tmp_path):
    """A folder with programs that print how they were called, or do the part of Slurm's that matters."""

    def make(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    make("qpipe", 'printf "%q " qpipe "$@"; echo')
    make("srun", 'shift; SLURM_NODEID=1 exec "$@"')
    make("scontrol", "echo node7; echo node8")
    return {"PATH": f"{tmp_path}:/usr/bin:/bin"}


def test_two_nodes_calls_launch(tools):
    command = [LAUNCH / "two-nodes.sh", "1", "node0:29500", "--out", "a b"]
    out = subprocess.run(command, env=tools, capture_output=True, text=True, check=True).stdout
    expected = ["qpipe", "launch", "--nodes", "2", "--node-rank", "1", "--rendezvous", "node0:29500", "--out", "a b"]
    assert shlex.split(out) == expected
    assert subprocess.run([LAUNCH / "two-nodes.sh"], env=tools, capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_slurm_calls_launch(tools, nodes):
    env = {**tools, "SLURM_NNODES": nodes, "SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]"}
    command = [LAUNCH / "slurm.sh", "--out", "a b"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    where = ["--nodes", "2", "--node-rank", "1", "--rendezvous", "node7:20123"] if nodes == "2" else []
    assert shlex.split(out) == ["qpipe", "launch", *where, "--out", "a b"]
