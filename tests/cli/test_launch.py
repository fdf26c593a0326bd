"""What `launch` decides and refuses before any process starts."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe import rundir
from qpipe.config import resolve
from qpipe.errors import ConfigError
from qpipe.files import write_json
from qpipe.launching import command, prepare, topology
from qpipe.launching.topology import Topology
from qpipe.resuming import differences


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(topology, "gpus_present", lambda: 0)


def test_dry_run_prints_a_script_that_writes_the_configuration_and_starts_torchrun(cli, config_file, tmp_path):
    out = tmp_path / "a run"
    result = cli(
        "launch", config_file, "--cpus", 3, "--zero", 2, "--set", "train.batch_size=6", "--out", out, "--dry-run"
    )
    assert result.code == 0
    assert not out.exists()
    *_, line = result.out.strip().splitlines()
    words = shlex.split(line)
    assert "DS_ACCELERATOR=cpu" in words and "CUDA_VISIBLE_DEVICES=" in words
    assert words[words.index(sys.executable) :][:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=3" in words and "--master-addr=127.0.0.1" in words
    assert words[-4:] == ["--module", "qpipe.cli", "train", str(out / "config.yaml")]
    without_start = result.out.strip().removesuffix(line)
    subprocess.run(["sh", "-c", without_start], check=True)
    config = resolve(out / "config.yaml")
    assert (config.engine.zero, config.engine.cpu, config.train.batch_size) == (2, True, 6)
    assert config.train.learning_rate == 1e-4


def test_plugins_keep_their_order_and_get_their_options(tmp_path, config_file):
    config, _ = prepare.configuration(config_file, ["b.weight=0.5"], ["b", "a"], None, False, 0)
    assert list(config.plugins.items()) == [("b", {"weight": 0.5}), ("a", {})]


def test_out_may_look_like_a_number(cli, config_file, tmp_path):
    config, _ = prepare.configuration(config_file, [], [], Path("20261122"), False, 0)
    assert config.out == "20261122"
    (tmp_path / "saved.yaml").write_text(prepare.dump(config))
    assert resolve(tmp_path / "saved.yaml").out == "20261122"


def test_unknown_plugin_is_refused_before_anything_starts(cli, config_file, tmp_path, installed_plugin):
    installed_plugin("squeeze", "squeeze_mod:Squeeze", "")
    result = cli("launch", config_file, "--plugins", "squeze", "--out", tmp_path / "run")
    assert result.code == 1
    assert "no plugin named 'squeze' is installed; did you mean 'squeeze'?" in result.err
    assert not (tmp_path / "run").exists()


def test_unknown_option_of_a_plugin_is_refused(cli, config_file, installed_plugin):
    installed_plugin("mine", "mine_mod:Mine", "import qpipe\nclass Mine(qpipe.Plugin):\n    pass\n")
    result = cli("launch", config_file, "--plugins", "mine", "--set", "mine.wieght=1", "--dry-run")
    assert result.code == 1
    assert "options of plugin 'mine': wieght is not an option" in result.err


def test_a_dry_run_is_for_any_machine(cli, config_file):
    result = cli("launch", config_file, "--gpus", 8, "--dry-run")
    assert result.code == 0 and "--nproc-per-node=8" in shlex.split(result.out.strip().splitlines()[-1])


@pytest.mark.parametrize("present", [0, 2])
def test_more_gpus_than_present(cli, config_file, monkeypatch, present):
    monkeypatch.setattr(topology, "gpus_present", lambda: present)
    result = cli("launch", config_file, "--gpus", 8)
    assert result.code == 1
    assert f"asked for 8 GPUs, {present} present" in result.err and "--cpus N" in result.err


@pytest.mark.parametrize(
    ("gpus", "cores", "prefer_cpu", "expected"),
    [(4, 8, False, (4, False)), (0, 8, False, (2, True)), (0, 1, False, (1, True)), (4, 8, True, (2, True))],
)
def test_default_processes(monkeypatch, gpus, cores, prefer_cpu, expected):
    monkeypatch.setattr(topology, "gpus_present", lambda: gpus)
    monkeypatch.setattr(topology, "cpu_cores", lambda: cores)
    where = topology.choose(None, None, prefer_cpu=prefer_cpu)
    assert (where.processes, where.cpu) == expected


def test_threads_are_shared_out_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(topology, "cpu_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert topology.environment(Topology(3, cpu=True))["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in topology.environment(Topology(3, cpu=True))
    assert "DS_ACCELERATOR" not in topology.environment(Topology(3, cpu=False))


def test_cpu_processes_keep_freed_memory_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert topology.environment(Topology(2, cpu=True))["MALLOC_MMAP_MAX_"] == "0"
    assert "MALLOC_MMAP_MAX_" not in topology.environment(Topology(2, cpu=False))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert "MALLOC_MMAP_MAX_" not in topology.environment(Topology(2, cpu=True))


@pytest.mark.parametrize("text", ["node0", "node0:", ":1", "node0:http", "node0:70000"])
def test_bad_rendezvous(text):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        topology.parse_rendezvous(text)


def test_two_machines(cli, config_file, tmp_path):
    args = ("launch", config_file, "--cpus", 2, "--nodes", 2, "--rendezvous", "n0:29500", "--out", tmp_path / "r")
    result = cli(*args, "--node-rank", 1, "--dry-run")
    words = shlex.split(result.out.strip().splitlines()[-1])
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=n0", "--master-port=29500"} <= set(words)
    assert words[-1] == str(tmp_path / "r/.node-1.yaml")


def test_hostfile_uses_the_launcher_of_deepspeed(tmp_path):
    from deepspeed.launcher.runner import parse_args

    hostfile = tmp_path / "hosts"
    with pytest.raises(ConfigError, match="slots=N"):
        topology.choose(None, None, hostfile=hostfile)
    hostfile.write_text("a slots=2\nb slots=2\n")
    where = topology.choose(None, None, rendezvous="a:1234", hostfile=hostfile)
    argv = command.command(where, tmp_path / "config.yaml", resume=True)
    assert argv[1:3] == ["-m", "deepspeed.launcher.runner"]
    args = parse_args(argv[3:])
    assert (args.hostfile, args.master_addr, args.master_port, args.module) == (str(hostfile), "a", 1234, True)
    assert args.no_local_rank and args.user_script == "qpipe.cli"
    assert args.user_args == ["train", str(tmp_path / "config.yaml"), "--resume"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"gradient_clipping": 1}', "sets gradient_clipping, which qpipe decides"),
        ('{"zero_optimization": {"stage": 3}}', "asks for ZeRO stage 3, engine.zero is 1; set both equal"),
    ],
)
def test_bad_deepspeed_file(cli, config_file, tmp_path, text, message):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    result = cli("launch", config_file, "--set", f"engine.config_file={path}", "--dry-run")
    assert result.code == 1 and message in result.err


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "model", "export", "results.json"])
def test_used_directory_is_refused(cli, config_file, tmp_path, name):
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)
    result = cli("launch", config_file, "--cpus", 1, "--out", out)
    assert result.code == 1
    assert f"already in use: it holds {name}" in result.err and "--resume" in result.err and "--out" in result.err


def test_a_directory_with_nothing_but_a_configuration_can_be_used_again(tmp_path):
    """A launch that fails before training, say for a wrong column name, must not block the next attempt."""
    (tmp_path / "config.yaml").touch()
    rundir.require_unused(tmp_path)


def test_lock_names_the_process_that_holds_it_and_is_freed_with_it(tmp_path):
    code = (
        "import sys, pathlib, time\nfrom qpipe.rundir import Lock\n"
        "with Lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "):
            rundir.Lock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with rundir.Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_resume_takes_the_saved_configuration_and_says_what_changed(cli, config_file, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    config, _ = prepare.configuration(config_file, [], [], out, False, 0)
    (out / "config.yaml").write_text(prepare.dump(prepare.with_device(config, True)))
    result = cli("launch", "--resume", "--out", out, "--set", "train.log_every=3", "--dry-run")
    assert result.code == 0
    assert result.err == "changed since the run was started: train.log_every: 10 -> 3\n"
    assert result.out.strip().endswith(f"train {out}/config.yaml --resume")
    assert cli("launch", "--resume", "--out", out, "--dry-run").err == ""


def test_resume_of_the_directory_that_an_override_names(cli, config_file, tmp_path, monkeypatch):
    """Not of the built-in recipe's, which may be there too."""
    monkeypatch.chdir(tmp_path)
    for out in ("runs/default", "runs/x"):
        Path(out).mkdir(parents=True)
        config, _ = prepare.configuration(config_file, [], [], Path(out), False, 0)
        Path(out, "config.yaml").write_text(prepare.dump(prepare.with_device(config, True)))
    result = cli("launch", "--resume", "--set", "out=runs/x", "--dry-run")
    assert result.code == 0 and "runs/x/config.yaml --resume" in result.out and "default" not in result.out
    assert "runs/default/config.yaml --resume" in cli("launch", "--resume", "--dry-run").out


@pytest.fixture
def started(config_file, tmp_path):
    """A run directory with a checkpoint of step 5, made by 3 CPU processes."""
    out = tmp_path / "run"
    (out / "checkpoints" / "step-00000005").mkdir(parents=True)
    write_json(out / "checkpoints" / "step-00000005" / "progress.json", {"step": 5, "best_step": 5, "world_size": 3})
    config, _ = prepare.configuration(config_file, ["train.batch_size=6"], [], out, False, 0)
    (out / "config.yaml").write_text(prepare.dump(prepare.with_device(config, True)))
    return out


def test_resume_uses_as_many_processes_as_before(cli, started):
    result = cli("launch", "--resume", "--out", started, "--dry-run")
    assert result.code == 0 and result.err == ""
    assert "--nproc-per-node=3" in result.out
    result = cli("launch", "--resume", "--out", started, "--cpus", 2)
    assert result.code == 1
    assert "was trained by 3 processes per machine" in result.err and "leave out --gpus and --cpus" in result.err


def test_a_gpu_that_torch_cannot_use_is_named(cli, config_file, tmp_path, monkeypatch):
    """A CPU build of torch would train on the processors, without a word."""
    monkeypatch.setattr(topology, "nvidia_devices", lambda: ["NVIDIA H100"])
    words = ("launch", config_file, "--out", tmp_path / "run", "--dry-run")
    assert "warning: this torch cannot use NVIDIA H100; `qpipe doctor` says more" in cli(*words).err
    for chosen in (("--cpus", 2), ("--set", "engine.cpu=true")):
        assert "warning" not in cli(*words, *chosen).err


@pytest.mark.parametrize("end", ["refused", "killed", "finished", "exported"])
def test_results_of_a_finished_run_stay_where_it_goes_on_in_vain(cli, started, monkeypatch, end):
    """Its configuration, too; but not once another export has taken the place of the one that they are of."""
    write_json(started / "results.json", {"evaluation": {"accuracy": 0.75}})
    (started / "export").mkdir()
    before = (started / "config.yaml").read_text()

    def workers(*given):
        assert not (started / "results.json").exists()
        assert "format: native" in (started / "config.yaml").read_text()
        if end == "refused":
            raise ConfigError("data.train has changed")
        if end == "killed":
            raise KeyboardInterrupt
        if end == "exported":
            (started / "new").mkdir()
            (started / "export").rmdir()
            (started / "new").rename(started / "export")
            raise ConfigError("it does not verify")
        write_json(started / "results.json", {"evaluation": {"accuracy": 0.5}})

    monkeypatch.setattr("qpipe.launching.start.start", workers)
    cli("launch", "--resume", "--out", started, "--set", "export.format=native")
    results = started / "results.json"
    kept = json.loads(results.read_text())["evaluation"]["accuracy"] if results.exists() else None
    assert kept == {"finished": 0.5, "exported": None}.get(end, 0.75)
    assert ((started / "config.yaml").read_text() == before) == (end in ("refused", "killed"))
    assert not (started / ".results.json").exists()


def test_results_that_a_killed_launcher_put_aside_are_of_no_other_run(tmp_path):
    write_json(tmp_path / ".results.json", {"evaluation": {"accuracy": 0.75}})
    with pytest.raises(ConfigError), rundir.results_aside(tmp_path, resume=False):
        raise ConfigError("refused")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["seed=3", "train.max_steps=6", "quantization.preset=w2", "engine.zero=2"])
def test_resume_refuses_what_decides_the_result(cli, started, change):
    result = cli("launch", "--resume", "--out", started, "--set", change)
    assert result.code == 1
    assert f"--resume cannot change what was started: {change.split('=')[0]}: " in result.err
    assert "another --out" in result.err


def test_resume_of_a_finished_run_changes_nothing(cli, started):
    results = {"evaluation": {"accuracy": 0.75}, "reloaded": {"accuracy": 0.75}, "seconds": {"train": 61.0}}
    write_json(started / "results.json", results)
    (started / "export").mkdir()
    before = {p: p.stat().st_mtime_ns for p in started.rglob("*")}
    result = cli("launch", "--resume", "--out", started)
    assert result.code == 0
    assert f"already complete: {started}/export" in result.out and "0.7500" in result.out
    assert {p: p.stat().st_mtime_ns for p in started.rglob("*")} == before
    moved = started.rename(started.with_name("moved"))
    assert f"already complete: {moved}/export" in cli("launch", "--resume", "--out", moved).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "quantization.preset=w4a9"], "quantization.preset 'w4a9' is unknown; did you mean 'w4a8'?"),
        (["--cpus", "3"], "train.batch_size 32 is not divisible by 3 processes x 1 micro-batches"),
        (["--plugins", "a,b,a"], "--plugins names 'a' twice"),
    ],
)
def test_what_needs_no_worker_is_refused_without_one(cli, config_file, tmp_path, arguments, message):
    result = cli("launch", config_file, "--out", tmp_path / "run", *arguments)
    assert result.code != 0 and message in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


def test_options_of_a_plugin_that_is_not_named(cli, config_file, installed_plugin):
    installed_plugin("squeeze", "squeeze_mod:Squeeze", "")
    result = cli("launch", config_file, "--set", "squeeze.weight=1")
    assert result.code == 1
    assert "squeeze is not an option, but a plugin that is installed: add --plugins squeeze" in result.err


def test_nothing_to_resume(cli, config_file, tmp_path):
    result = cli("launch", "--resume", "--out", tmp_path / "none")
    assert result.code == 1 and "holds no config.yaml" in result.err
    result = cli("launch", config_file, "--cpus", 1, "--resume", "--out", tmp_path / "none")
    assert result.code == 1 and "nothing to resume" in result.err


def test_plugins_in_another_order_are_another_run():
    first = resolve(None, [], ["kure", "ti-g"])
    second = first.model_copy(update={"plugins": dict(reversed(first.plugins.items()))})
    assert differences(first, second) == ['order of plugins: ["kure", "ti-g"] -> ["ti-g", "kure"]']


def test_differences_name_added_and_removed_keys():
    old = resolve({"model": {"name": "m"}, "plugins": {"a": {"x": 1}}})
    new = resolve({"model": {"name": "n"}, "plugins": {"b": {}}})
    assert differences(old, new) == [
        'model.name: "m" -> "n"',
        "plugins.a.x: 1 -> not set",
        "plugins.b: not set -> {}",
    ]
