import json

import pytest
from rich.console import Console

from qpipe.errors import CheckpointError, ConfigError
from qpipe.report import format as fmt
from qpipe.report.table import results_rows, results_table

SIZE = "file size (full precision: float32)"


def test_rows_hold_metrics_size_and_time(run_dir):
    rows = {row["quantity"]: row for row in results_rows(run_dir)}
    assert list(rows) == ["accuracy", "f1", "bits per weight", SIZE, "time, all stages"]
    assert rows["accuracy"] == {
        "quantity": "accuracy", "unit": "", "full_precision": 0.8713, "quantized": 0.8531, "packed": 0.8531
    }  # fmt: skip
    assert rows["bits per weight"]["packed"] == 4.28
    assert (rows[SIZE]["full_precision"], rows[SIZE]["packed"]) == (90_900_000, 12_345_678)
    assert rows["time, all stages"]["quantized"] == pytest.approx(247.5)


def test_a_total_is_not_added_to_the_stages(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    results["seconds"]["total"] = 300.0
    (run_dir / "results.json").write_text(json.dumps(results))
    assert results_rows(run_dir)[-1]["quantized"] == 300.0


def test_what_was_not_measured_is_left_out(run_dir):
    (run_dir / "results.json").write_text(json.dumps({"evaluation": {"loss": 0.5, "note": "text"}, "size": {}}))
    assert results_rows(run_dir) == [
        {"quantity": "loss", "unit": "", "full_precision": None, "quantized": 0.5, "packed": None}
    ]


def test_table_prints_every_value(run_dir):
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(results_table(run_dir))
    text = captured.get()
    for part in (
        "accuracy",
        "0.8713",
        "0.8531",
        "4.28",
        "90.9 MB",
        "12.3 MB (7.4x smaller)",
        "4 min 08 s",
        "export 3.9 s",
    ):
        assert part in text, part


def test_errors_say_what_is_missing(run_dir):
    (run_dir / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"results\.json is missing.*--resume"):
        results_rows(run_dir)
    with pytest.raises(ConfigError, match="not a run directory"):
        results_table(run_dir / "export")


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (fmt.size(999), "999 B"), (fmt.size(1500), "1.5 kB"), (fmt.size(2.5e9), "2.5 GB"),
        (fmt.size(None), fmt.MISSING),
        (fmt.duration(0.44), "0.4 s"), (fmt.duration(9.96), "10 s"), (fmt.duration(185), "3 min 05 s"),
        (fmt.duration(7620), "2 h 07 min"), (fmt.decimal(0.85312), "0.8531"), (fmt.decimal(1e-5), "1e-05"),
        (fmt.decimal(float("nan")), "nan"), (fmt.plain(4.0), "4"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(made, text):
    assert made == text
