"""The tables of docs/results.md: their recipes resolve, and the page shows what was measured with them."""

import json
import re
from itertools import pairwise

import pytest
import yaml
from pydantic import ValidationError

from benchmarks.results.__main__ import with_starts
from benchmarks.results.cell import Cell, filled
from benchmarks.results.figures import FIGURES, draw
from benchmarks.results.fill import fill, refuse_other_inputs, run_cell
from benchmarks.results.record import Measured, differences, is_done, measure, read_expected, write_expected
from benchmarks.results.render import DOCUMENT, STALE, is_stale, render, start_marker, write
from benchmarks.results.table import Table, read_table, tables
from qpipe.config import resolve

TABLES = tables()
SWEEP = {"bits": "3,8", "ratios": "0.9,1.1", "shown": ["bits=3"]}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_recipe_resolves_in_every_setting(table):
    for setting, options in table.settings.items():
        folders = dict.fromkeys(options.placeholders(), DOCUMENT.parent)
        for row in table.rows_of(setting):
            cell = Cell(table, row, setting, seed=3)
            config = resolve(table.recipe(row), [filled(text, folders) for text in cell.overrides])
            assert config.seed == 3, row


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_page_shows_what_is_recorded(table):
    text = DOCUMENT.read_text()
    shown = text.partition(start_marker(table))[2].partition("<!-- end of table -->")[0].strip()
    assert shown == render(table)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_page_shows_figures_that_are_there(table, tmp_path):
    draw(table, tmp_path)
    for figure in re.findall(r"\(figures/([^)]*)\)", render(table)):
        assert (tmp_path / figure).stat().st_size > 0
        assert (FIGURES / figure).is_file(), "run `make results RESULTS=--render-only`"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_no_number_is_older_than_its_recipe(table):
    for row in table.rows:
        for setting, measured in read_expected(table.expected(row)).items():
            assert not is_stale(table, row, setting, measured), f"{row}, {setting}: run `make results`"
            assert len(measured.cells) == table.settings[setting].seeds


@pytest.fixture
def small_table(tmp_path):
    """A table of two rows, one of which starts from the other."""
    folder = tmp_path / "examples" / "tiny"
    document = {
        "tolerance": 0.01,
        "settings": {"here": {"title": "here", "seeds": 2, "overrides": ["train.epochs=2"]}},
        "rows": {"first": {"title": "first"}, "second": {"title": "second", "start": "first"}},
    }
    for row in document["rows"]:
        (folder / row).mkdir(parents=True)
        (folder / row / "recipe.yaml").write_text("model: {name: m}\n")
    (folder / "table.yaml").write_text(yaml.safe_dump(document))
    return read_table(folder)


def finish(cell, runs, accuracy):
    folder = cell.folder(runs)
    folder.mkdir(parents=True)
    size = {"file_bytes": 2e6, "full_precision_bytes": 8e6, "bits_per_weight": 4.5}
    results = {"evaluation": {"accuracy": accuracy}, "reloaded": {"accuracy": accuracy}, "size": size}
    (folder / "results.json").write_text(json.dumps(results))


def test_a_row_is_measured_when_all_its_seeds_are_there(small_table, tmp_path):
    cells = [Cell(small_table, "first", "here", seed) for seed in (0, 1)]
    finish(cells[0], tmp_path, 0.5)
    assert measure(small_table, "first", "here", tmp_path) is None
    finish(cells[1], tmp_path, 0.6)
    measured = measure(small_table, "first", "here", tmp_path)
    assert measured is not None
    assert measured.metrics == {"accuracy": [0.5, 0.6]}
    assert measured.file_megabytes == 2
    write_expected(small_table.expected("first"), {"here": measured})
    assert read_expected(small_table.expected("first")) == {"here": measured}
    assert "| first | 0.550 ± 0.071 (2) | 4.50 | 2.00 of 8.00 |" in render(small_table)


def test_a_row_may_show_the_last_evaluation_in_training(small_table, tmp_path):
    """In it a teacher may stand in, which the run's result and its packed checkpoint have not."""
    document = small_table.model_dump(mode="json") | {"folder": small_table.folder}
    document["rows"]["first"]["evaluation"] = "last-logged"
    table = Table(**document)
    for seed in (0, 1):
        cell = Cell(table, "first", "here", seed)
        finish(cell, tmp_path, 0.5)
        logged = [{"step": step, "kind": "eval", "accuracy": 0.7 + step / 100} for step in (1, 2)]
        text = "".join(json.dumps(row) + "\n" for row in logged)
        (cell.folder(tmp_path) / "metrics.jsonl").write_text(text)
    measured = measure(table, "first", "here", tmp_path)
    assert measured.metrics == {"accuracy": [0.72, 0.72]}
    assert measured.reloaded == {}, "another model than the one that was evaluated"
    assert measured.file_megabytes == 2


def test_sizes_are_given_for_each_model_of_a_table(small_table):
    """Models are told apart by their parameters, whatever type the file they are compared with has."""
    document = small_table.model_dump(mode="json") | {"folder": small_table.folder}
    settings = {name: document["settings"]["here"] | {"title": name} for name in ("here", "there", "large")}
    table = Table(**document | {"settings": settings})

    def sized(megabytes: float, bits: float, whole: float) -> Measured:
        size = {"file_megabytes": megabytes, "bits_per_weight": bits, "full_precision_megabytes": whole}
        return Measured(cells=["0"], metrics={"accuracy": [0.5]}, tolerance=0.01, **size)

    small, half = sized(2.2, 4, 17.6), sized(2.2, 4, 8.8)
    write_expected(table.expected("first"), {"here": small, "there": half, "large": sized(9.08, 8, 36.32)})
    write_expected(table.expected("second"), {"here": small})
    heads, _, first, second = render(table).splitlines()[:4]
    sizes = [f"{what}, {model} parameters" for model in ("4.4M", "9.1M") for what in ("bits per weight", "file, MB")]
    assert heads == f"|  | here | there | large | {' | '.join(sizes)} |"
    assert first.endswith("| 4.00 | 2.20 of 8.80 | 8.00 | 9.08 of 36.32 |")
    assert second.endswith("| 4.00 | 2.20 of 17.60 | - | - |")


def test_averages_over_settings_go_seed_by_seed(small_table):
    """Where every setting was measured with as many seeds; and the settings must exist."""
    document = small_table.model_dump(mode="json") | {"folder": small_table.folder}
    there = document["settings"]["here"] | {"title": "there"}
    table = Table(
        **document | {"settings": document["settings"] | {"there": there}, "averages": {"both": ["here", "there"]}}
    )
    measured = {}
    for setting, values in {"here": [0.5, 0.6], "there": [0.7, 0.8]}.items():
        cells = [Cell(table, "first", setting, seed).digest for seed in (0, 1)]
        measured[setting] = Measured(cells=cells, metrics={"accuracy": values}, tolerance=0.01)
    write_expected(table.expected("first"), measured)
    write_expected(table.expected("second"), {"here": measured["here"]})
    heads, _, first, second = render(table).splitlines()[:4]
    assert heads.startswith("|  | here | there | both |")
    assert first.endswith("| 0.650 ± 0.071 (2) |")
    assert second.endswith("| - | - |")
    for wrong in ({"averages": {"none": []}}, {"averages": {"one": ["here"]}, "sweep": SWEEP}):
        with pytest.raises(ValidationError, match="averages need settings to average over, and a table without"):
            Table(**document | wrong)
    small_table.recipe("first").write_text("model: {name: other}\n")
    assert f"| 0.650 ± 0.071 (2){STALE} |" in render(table)
    with pytest.raises(ValidationError, match="'nowhere' under averages is no setting; there are here"):
        Table(**document | {"averages": {"both": ["here", "nowhere"]}})


def test_a_changed_recipe_makes_its_number_and_those_that_start_from_it_stale(small_table, tmp_path):
    for row in ("first", "second"):
        for seed in (0, 1):
            finish(Cell(small_table, row, "here", seed), tmp_path, 0.5)
        write_expected(small_table.expected(row), {"here": measure(small_table, row, "here", tmp_path)})
    assert STALE not in render(small_table)
    small_table.recipe("first").write_text("model: {name: other}\n")
    assert render(small_table).count(STALE) == 2


def test_a_digest_that_looks_like_a_number_stays_text(small_table):
    path = small_table.expected("first")
    written = {"here": Measured(cells=["12e345678901"], metrics={"accuracy": [0.5]}, tolerance=0.01)}
    write_expected(path, written)
    assert read_expected(path) == written


def test_numbers_beyond_the_tolerance_are_named(small_table):
    before = Measured(cells=["a"], metrics={"accuracy": [0.5]}, tolerance=0.01)
    assert differences(Measured(cells=["a"], metrics={"accuracy": [0.509]}, tolerance=0.01), before) == []
    assert differences(Measured(cells=["a"], metrics={"accuracy": [0.52]}, tolerance=0.01), before) == [
        "accuracy 0.5200, recorded 0.5000 ± 0.01"
    ]


def test_variants_are_compared_within_their_own_spread():
    same = {"cells": ["a", "b"], "metrics": {"accuracy": [0.5, 0.5]}, "tolerance": 0.01}
    before = Measured(**same, points={"bits=3": [0.4, 0.42], "bits=8": [0.5, 0.5]})
    near = Measured(**same, points={"bits=3": [0.43, 0.43], "bits=8": [0.49, 0.5]})
    assert differences(near, before) == []
    far = Measured(**same, points={"bits=3": [0.45, 0.45], "bits=8": [0.48, 0.48]})
    assert differences(far, before) == [
        "bits=3 0.4500, recorded 0.4100 ± 0.0282843",
        "bits=8 0.4800, recorded 0.5000 ± 0.01",
    ]


def test_cells_run_once_and_after_what_they_start_from(small_table, tmp_path, monkeypatch):
    ran = []

    def run(cell, runs, folders, jobs):
        ran.append((cell.row, cell.seed))
        if (cell.row, cell.seed) == ("first", 1):
            raise RuntimeError("out of memory")
        finish(cell, runs, 0.5)

    monkeypatch.setattr("benchmarks.results.fill.run_cell", run)
    cells = with_starts([Cell(small_table, "second", "here", seed) for seed in (0, 1)])
    assert [cell.row for cell in cells] == ["first", "second", "first", "second"]
    failures = fill(cells, tmp_path, {}, 1, lambda cell: None)
    assert sorted(ran) == [("first", 0), ("first", 1), ("second", 0)]
    assert "out of memory" in failures[0]
    assert "what it starts from is missing" in failures[1]
    fill(cells, tmp_path, {}, 1, lambda cell: None)
    assert sorted(ran)[:3] == [("first", 0), ("first", 1), ("first", 1)]


def test_interrupted_runs_go_on_with_their_number_of_processes(small_table, tmp_path, monkeypatch):
    """One process each where several run at a time; but a run that began with two goes on with two."""
    called = []
    monkeypatch.setattr("benchmarks.results.fill._call", lambda words, log, jobs: called.append(words))
    cell = Cell(small_table, "first", "here", 0)
    run_cell(cell, tmp_path, {}, 1)
    run_cell(cell, tmp_path, {}, 2)
    assert "--cpus" not in called[0] and called[1][-2:] == ["--cpus", "1"]
    monkeypatch.setattr("benchmarks.results.fill.saved_processes", lambda out, nodes: 2)
    run_cell(cell, tmp_path, {}, 2)
    assert "--cpus" not in called[2]


def test_runs_on_another_model_or_other_data_are_not_taken_for_these(small_table, tmp_path):
    setting = small_table.settings["here"].model_copy(update={"overrides": ("model.name={small}", "train.epochs=2")})
    cells = [Cell(small_table.model_copy(update={"settings": {"here": setting}}), "first", "here", 0)]
    models = [tmp_path / name for name in ("one", "copy", "two")]
    for model in models:
        model.mkdir()
        (model / "weights").write_text("other" if model.name == "two" else "same")
    refuse_other_inputs(cells, tmp_path, {"small": models[0]})
    refuse_other_inputs(cells, tmp_path, {"small": models[2]})  # nothing was run yet
    refuse_other_inputs(cells, tmp_path, {"small": models[0]})
    finish(cells[0], tmp_path, 0.5)
    refuse_other_inputs(cells, tmp_path, {"small": models[1]})
    with pytest.raises(SystemExit, match=r"was run with another model.name; name another folder for runs \(--runs\)"):
        refuse_other_inputs(cells, tmp_path, {"small": models[2]})


def test_commands_say_what_the_row_says(small_table, tmp_path):
    first, second = (Cell(small_table, row, "here", 1) for row in ("first", "second"))
    words = second.command(tmp_path, {})
    assert f"teacher.name={first.folder(tmp_path) / 'model'}" in words
    assert all(a == "--set" for a, b in pairwise(words) if b.startswith(("seed=", "teacher.name=", "train.epochs=")))


def test_a_quantized_row_takes_the_model_it_starts_from(small_table, tmp_path):
    rows = {**small_table.rows, "second": small_table.rows["second"].model_copy(update={"command": "quantize"})}
    setting = small_table.settings["here"].model_copy(update={"overrides": ("model.name={small}", "train.epochs=2")})
    table = small_table.model_copy(update={"rows": rows, "settings": {"here": setting}})
    words = Cell(table, "second", "here", 0).command(tmp_path, {"small": tmp_path})
    first = Cell(table, "first", "here", 0)
    assert words[words.index("quantize") + 1] == str(first.folder(tmp_path) / "model")
    assert not [word for word in words if word.startswith("model.name")], "it would take the place of that model"
    assert f"model.name={tmp_path}" in first.command(tmp_path, {"small": tmp_path})


def with_script(table, text="print('changed')\n"):
    """The table with a script that changes the model which the second row starts from."""
    (table.folder / "change.py").write_text(text)
    document = yaml.safe_load((table.folder / "table.yaml").read_text())
    document["settings"]["here"]["transform"] = "change.py"
    (table.folder / "table.yaml").write_text(yaml.safe_dump(document))
    return read_table(table.folder)


def test_rows_start_from_what_a_script_makes_of_a_model(small_table, tmp_path, monkeypatch):
    plain = [Cell(small_table, row, "here", 0) for row in ("first", "second")]
    table = with_script(small_table)
    first, second = (Cell(table, row, "here", 0) for row in ("first", "second"))
    assert first.digest == plain[0].digest, "its own numbers are the same"
    assert second.digest != plain[1].digest
    changed = first.model(tmp_path)
    assert changed.name.startswith("transformed")
    assert f"teacher.name={changed}" in second.command(tmp_path, {})
    assert f"teacher.name={plain[0].folder(tmp_path) / 'model'}" in plain[1].command(tmp_path, {})
    called = []
    monkeypatch.setattr("benchmarks.results.fill._call", lambda words, log, jobs: called.append(words[1:]))
    finish(first, tmp_path, 0.5)
    assert not is_done(first, tmp_path), "others cannot start yet"
    run_cell(first, tmp_path, {}, 1)
    assert called == [[str(table.folder / "change.py"), str(first.folder(tmp_path)), str(changed)]]
    changed.mkdir()
    assert is_done(first, tmp_path)
    run_cell(first, tmp_path, {}, 1)
    finish(second, tmp_path, 0.5)
    assert is_done(second, tmp_path), "nothing starts from it"
    assert len(called) == 1
    (table.folder / "change.py").write_text("print('otherwise')\n")
    assert Cell(table, "second", "here", 0).digest != second.digest
    assert not is_done(first, tmp_path), "what the other script made is of no use"
    (table.folder / "change.py").unlink()
    with pytest.raises(ValueError, match=r"has no script 'change.py'"):
        read_table(table.folder)


def test_settings_that_train_the_same_share_the_run(small_table, tmp_path, monkeypatch):
    table = with_script(small_table)
    document = yaml.safe_load((table.folder / "table.yaml").read_text())
    document["settings"]["plain"] = {**document["settings"]["here"], "transform": None}
    (table.folder / "table.yaml").write_text(yaml.safe_dump(document))
    table = read_table(table.folder)
    order = []

    def run(cell, runs, folders, jobs):
        order.append((cell.row, cell.setting))
        if not (cell.folder(runs) / "results.json").is_file():
            finish(cell, runs, 0.5)
        cell.model(runs).mkdir()

    monkeypatch.setattr("benchmarks.results.fill.run_cell", run)
    cells = with_starts([Cell(table, "second", setting, 0) for setting in ("plain", "here")])
    assert [cell.setting for cell in cells] == ["plain", "plain", "here", "here"]
    first, planted = cells[0], cells[2]
    assert first.folder(tmp_path) == planted.folder(tmp_path)
    assert cells[1].folder(tmp_path) != cells[3].folder(tmp_path)
    assert fill(cells, tmp_path, {}, 2, lambda cell: None) == []
    assert order.index(("first", "here")) < order.index(("second", "here")), "its model is there before"
    assert measure(table, "first", "plain", tmp_path) is None, "its second seed is missing"


def test_headings_come_above_the_rows_that_were_measured(small_table, tmp_path):
    named = {row: small_table.rows[row].model_copy(update={"section": f"about {row}"}) for row in small_table.rows}
    table = small_table.model_copy(update={"rows": named})
    for seed in (0, 1):
        finish(Cell(table, "second", "here", seed), tmp_path, 0.5)
    write_expected(table.expected("second"), {"here": measure(table, "second", "here", tmp_path)})
    lines = render(table).splitlines()
    assert lines[2] == "| **about second** |  |  |  |"
    assert lines[3].startswith("| second | 0.500")
    assert "about first" not in render(table)


def test_a_page_without_the_marker_is_an_error(small_table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Results\n")
    with pytest.raises(ValueError, match="lacks '<!-- table: tiny -->'"):
        write([small_table], page)


def test_a_row_without_a_recipe_is_an_error(small_table):
    small_table.recipe("second").unlink()
    with pytest.raises(ValueError, match="rows and recipes differ in second"):
        read_table(small_table.folder)
