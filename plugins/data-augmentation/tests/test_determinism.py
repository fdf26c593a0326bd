"""The same rows by any number of processes, and after an interruption."""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from qpipe_data_augmentation.__main__ import app
from typer.testing import CliRunner

from qpipe.testing import run_distributed, tiny_config
from qpipe.testing.tiny import BAD, GOOD, OTHER

runner = CliRunner()


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, masked_lm, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import processes

    options = {"model": str(masked_lm), "neighbours": "none", "trials": 2, "block": 30, "batch_size": 16}
    config = tiny_config(tmp_path, train__max_steps=None)
    alone = processes.rows(config.model_dump(mode="json"), options)
    there = config.model_copy(update={"out": str(tmp_path / "three")}).model_dump(mode="json")
    together = run_distributed("processes:rows", 3, source=there, options=options)
    assert alone["written"] == [[f"part-0000{i}.parquet" for i in range(5)]]
    assert [len(files) for files in together["written"]] == [2, 2, 1], "each file by one process"
    assert sorted(name for files in together["written"] for name in files) == alone["written"][0]
    assert together["seen"] == alone["seen"] * 3
    assert len(alone["seen"][0][0]) > 200


@pytest.fixture
def sentences(tmp_path):
    words = [*GOOD, *BAD, *OTHER]
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 8)) for i in range(80)]
    table = pa.table({"idx": list(range(80)), "sentence": texts, "label": [i % 2 for i in range(80)]})
    pq.write_table(table, tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def command(data, out, masked_lm):
    options = ("neighbours=none", "trials=2", "block=2")
    words = [word for option in options for word in ("--set", option)]
    return [sys.executable, "-m", "qpipe_data_augmentation", str(data), str(out), "--model", str(masked_lm), *words]


KILLED = """
import os, signal, sys
from qpipe_data_augmentation import __main__ as program, blocks

written, write = [], blocks.Blocks.write


def write_and_die(*given):
    write(*given)
    written.append(given)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


blocks.Blocks.write = write_and_die
program.app(sys.argv[1:])
"""
"""The command, which is killed as soon as it has written its third file."""


def parts(out):
    return sorted(out.with_name(f"{out.name}.parts").glob("*/part-*.parquet"))


def test_what_was_written_survives_a_kill(sentences, tmp_path, masked_lm):
    out = tmp_path / "augmented.parquet"
    done = subprocess.run([sys.executable, "-c", KILLED, *command(sentences, out, masked_lm)[3:]], capture_output=True)
    before = {path: path.stat().st_mtime_ns for path in parts(out)}
    said = done.stderr.decode()
    assert done.returncode == -signal.SIGKILL and len(before) == 3 and not out.exists(), said[-2000:]
    assert "augmenting 80 examples into" in said, "progress is told without a terminal too"
    runner.invoke(app, command(sentences, out, masked_lm)[3:], catch_exceptions=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "files that were there are not made again"
    assert len(parts(out)) == 40

    whole = tmp_path / "whole.parquet"
    done = runner.invoke(app, command(sentences, whole, masked_lm)[3:], catch_exceptions=False)
    assert pq.read_table(out).equals(pq.read_table(whole))
    table, source = pq.read_table(whole), pq.read_table(sentences)
    assert table.schema.equals(source.schema)
    assert table["label"].to_pylist() == [i % 2 for i in table["idx"].to_pylist()], "other columns are those of the row"
    assert f"{len(table)} rows of 80 examples" in done.output and 160 < len(table) <= 240


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--columns": "text"}, "has no column 'text'; its columns are: idx, sentence, label"),
        ({"--columns": "idx"}, "column 'idx' holds int64, not text"),
        ({"--model": ""}, "name a masked language model with --model"),
        ({"--task": "sst-2"}, "--task 'sst-2' is none of cola, mrpc, rte, stsb, sst2, qnli, mnli, qqp; for other data"),
        ({"--set": "trials=many"}, "--set trials: Input should be a valid integer"),
        ({"--set": "neighbours=vectors"}, "neighbours_from names no file"),
    ],
)
def test_impossible_requests(sentences, tmp_path, masked_lm, changes, message):
    words = {"--model": str(masked_lm), "--set": "neighbours=none", **changes}
    found = runner.invoke(
        app, [str(sentences), str(tmp_path / "out.parquet"), *(w for pair in words.items() for w in pair)]
    )
    assert found.exit_code == 1 and message in str(found.exception) + found.output
