import json
import shutil
import types
from pathlib import Path

import pytest

from qpipe import doctor
from qpipe.doctor import GIB


def one(findings, topic):
    return next(finding for finding in findings if finding.topic == topic)


def test_this_machine_can_train(cli):
    result = cli("doctor", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(result.out)}
    assert result.code == 0
    assert {"python", "torch", "CPU", "C++ compiler", "ninja", "DeepSpeed ops", "memory", "disk"} <= set(findings)
    assert findings["DeepSpeed ops"]["found"].startswith("can build: ")
    assert not any(finding["status"] == "fatal" for finding in findings.values())
    assert all(finding["advice"] for finding in findings.values() if finding["status"] != "ok")


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = one(list(doctor._compilers()), "C++ compiler")
    assert finding.status == "problem" and "apt-get install g++" in finding.advice


def test_cpu_build_of_torch_beside_a_gpu(monkeypatch, tmp_path):
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch, "version", types.SimpleNamespace(cuda=None, hip=None))
    finding = one(list(doctor._torch()), "torch build")
    assert finding.status == "problem" and "NVIDIA H100" in finding.found and "CUDA build" in finding.advice


def test_missing_package_makes_training_impossible(cli, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "_deepspeed_ops", lambda: iter(()))
    result = cli("doctor")
    assert result.code == 1
    assert "fatal: no-such-package: not installed\n  -> pip install" in result.out


CHECKS = {"disk": lambda: doctor._disk(Path("/")), "shared memory": doctor._shared_memory}


@pytest.mark.parametrize("topic", CHECKS)
def test_little_room(monkeypatch, topic):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=GIB // 2, total=GIB))
    finding = one(list(CHECKS[topic]()), topic)
    assert finding.status == "problem" and finding.found.startswith("0.5 of 1.0 GiB free") and finding.advice


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def _memory():
        raise OSError("no /proc")
        yield

    monkeypatch.setattr(doctor, "_memory", _memory)
    monkeypatch.setattr(doctor, "_deepspeed_ops", lambda: iter(()))
    findings = doctor.examine()
    assert one(findings, "memory").found == "failed: OSError: no /proc"
    assert one(findings, "disk").status in ("ok", "problem")
