"""Runs in this process, on one CPU process of the accelerate engine; verification is left to the tests about it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

import qpipe
from qpipe.config import RunConfig
from qpipe.host import load_plugins
from qpipe.testing import tiny_config

EXECUTE = importlib.import_module("qpipe.stages.execute")
"""`qpipe.stages.execute` the module; the package's attribute of that name is the function."""


def no_verification(folder, trust_remote_code, run_program):
    return SimpleNamespace(passed=True, metrics={}, lines=list)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run that nothing changes; copy `run.out` to damage it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(EXECUTE, "verify", no_verification)
    run = qpipe.execute(tiny_config(tmp_path_factory.mktemp("finished")))
    patch.undo()
    return run


@pytest.fixture
def use(monkeypatch):
    """`use(plugin, ...)`: these plugin objects take part in every run of the test, as if named in `--plugins`."""

    def make(*plugins):
        extra = [(f"test-{number}", plugin) for number, plugin in enumerate(plugins)]

        def load(options, *args, **kwargs):
            return load_plugins(options, *args, extra=extra, **kwargs)

        for module in ("qpipe.stages.execute", "qpipe.stages.trained", "qpipe.testing.gradients"):
            monkeypatch.setattr(importlib.import_module(module), "load_plugins", load)

    return make


@pytest.fixture
def fast(monkeypatch):
    """Runs are not verified."""
    monkeypatch.setattr(EXECUTE, "verify", no_verification)


@pytest.fixture
def assembled(use):
    """`assembled(config, plugin, ...)`: a run before its first batch."""

    def make(config: RunConfig, *plugins):
        use(*plugins)
        return EXECUTE.assemble(config, EXECUTE.load_plugins(config.plugins), {})

    return make
