import io
import json
import sys
from types import SimpleNamespace

import pytest

from qpipe.builtin.log import Log
from qpipe.errors import CheckpointError

METRICS = {"loss": 0.5, "task": 0.4, "demo/part": 0.1, "lr": 3e-5, "samples_per_second": 200.0}


def make_run(out, rank=0, total=100, **results):
    return SimpleNamespace(engine=SimpleNamespace(rank=rank), out=out, total_steps=total, results=results)


def step(index):
    return SimpleNamespace(index=index)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def train(log, run, steps, every=10):
    for index in steps:
        log.qpipe_step_end(run, step(index), METRICS if (index + 1) % every == 0 else {})


def test_rows_for_logged_steps_and_evaluations(tmp_path, capsys):
    log, run = Log(), make_run(tmp_path)
    log.qpipe_run_start(run)
    train(log, run, range(20))
    log.qpipe_evaluated(run, {"accuracy": 0.75})
    log.qpipe_run_end(run)
    written = rows(tmp_path)
    assert [(r["kind"], r["step"]) for r in written] == [("train", 10), ("train", 20), ("eval", 20)]
    assert {k: written[0][k] for k in METRICS} == METRICS
    assert written[2]["accuracy"] == 0.75 and written[0]["time"] > 1.6e9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step  10/100  loss 0.5  task 0.4  demo/part 0.1  lr 3e-05  200 samples/s")
    assert lines[0].endswith("left")
    assert lines[2] == "eval at step  20/100  accuracy 0.75"


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log, run = Log(), make_run(tmp_path, rank=1)
    log.qpipe_run_start(run)
    train(log, run, range(10))
    log.qpipe_evaluated(run, {"accuracy": 0.75})
    log.qpipe_run_error(run, RuntimeError("x"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_resume_drops_rows_beyond_the_step_and_a_cut_off_line(tmp_path):
    log, run = Log(), make_run(tmp_path)
    log.qpipe_run_start(run)
    train(log, run, range(40))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "ste')
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    resumed = make_run(tmp_path, resumed_step=25)
    log = Log()
    log.qpipe_run_start(resumed)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before
    train(log, resumed, range(25, 40))
    assert [r["step"] for r in rows(tmp_path)] == [10, 20, 30, 40]


def test_a_start_from_scratch_keeps_no_rows(tmp_path):
    log, run = Log(), make_run(tmp_path)
    log.qpipe_run_start(run)
    train(log, run, range(20))
    Log().qpipe_run_start(make_run(tmp_path))
    assert rows(tmp_path) == []


def test_damaged_log_is_refused_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\nnonsense\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        Log().qpipe_run_start(make_run(tmp_path, resumed_step=2))


def test_values_that_are_not_finite_are_null(tmp_path, capsys):
    log, run = Log(), make_run(tmp_path)
    log.qpipe_run_start(run)
    log.qpipe_step_end(run, step(0), {"loss": float("nan"), "grad_norm": float("inf")})
    assert rows(tmp_path)[0]["loss"] is None and rows(tmp_path)[0]["grad_norm"] is None
    assert "loss not finite" in capsys.readouterr().out


def test_unwritable_log_says_what_to_do(tmp_path):
    log, run = Log(), make_run(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
        log.qpipe_step_end(run, step(0), METRICS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_a_bar_that_error_and_end_remove(tmp_path, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm-256color")
    log, run = Log(), make_run(tmp_path, total=20)
    log.qpipe_run_start(run)
    train(log, run, range(10))
    log.qpipe_evaluated(run, {"accuracy": 0.75})
    log.qpipe_run_error(run, RuntimeError("boom"))
    shown = terminal.getvalue()
    assert "10/20" in shown and "demo/part 0.1" in shown and "200 samples/s" in shown
    assert "eval at step 10/20  accuracy 0.75" in shown
    assert log._bar is None
    log.qpipe_run_end(run)
    assert "stopped at step 10/20: RuntimeError" in capsys.readouterr().out
