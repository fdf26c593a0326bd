"""Augmented data without a run: `python -m qpipe_data_augmentation train.parquet augmented.parquet --model NAME`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from pydantic import ValidationError

from qpipe import DataError, QpipeError
from qpipe_data_augmentation.augment import Source, augment
from qpipe_data_augmentation.blocks import EXAMPLE, Blocks, writing
from qpipe_data_augmentation.budgets import require_task, trials_of
from qpipe_data_augmentation.options import AugmentationOptions


class Alone:
    """One process, on a GPU if there is one."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def barrier(self) -> None:
        """Nobody else to wait for."""

    def broadcast_object(self, value: Any) -> Any:
        """What was given."""
        return value


def merge(blocks: Blocks, table: pa.Table, out: Path) -> int:
    """Write all rows to one file, with the other columns of their examples; returns how many rows there are."""
    rows = 0
    with writing(out) as temporary, pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
        for part in blocks.tables():
            copied = table.take(part[EXAMPLE])
            for column in blocks.columns:
                copied = copied.set_column(copied.schema.get_field_index(column), table.schema.field(column),
                                           part[column].cast(table.schema.field(column).type))  # fmt: skip
            writer.write_table(copied)
            rows += len(copied)
    return rows


def read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """A parquet file with complete columns of text.

    Raises:
        DataError: it cannot be read, lacks a column, or a text is missing.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
    for column in columns:
        if column not in table.column_names:
            raise DataError(f"{path} has no column {column!r}; its columns are: {', '.join(table.column_names)}")
        if not pa.types.is_string(table.schema.field(column).type) and not pa.types.is_large_string(
            table.schema.field(column).type
        ):
            raise DataError(f"{path}: column {column!r} holds {table.schema.field(column).type}, not text")
        if table[column].null_count:
            raise DataError(f"{path}: {table[column].null_count} texts of column {column!r} are missing")
    if not len(table):
        raise DataError(f"{path} has no rows")
    return table


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Parquet file with one example a row.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write. OUT.parts keeps the parts for later calls.")],
    columns: Annotated[str, typer.Option(help="One or two columns of text, with a comma between them.")] = "sentence",
    model: Annotated[str, typer.Option(help="Masked language model, or where its tokenizer is.")] = "",
    task: Annotated[str, typer.Option(help="GLUE task whose number of trials is used.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option of the plugin, as NAME=VALUE.")] = None,
) -> None:
    """Write the augmented rows of a file. Killed and started again, it goes on where it was."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qpipe.data-augmentation").setLevel(logging.INFO)  # how far it is, where no bar can be shown
    try:
        settings = dict(item.partition("=")[::2] for item in set_ or ())
        options = AugmentationOptions.model_validate_strings({**settings, **({"model": model} if model else {})})
        if options.model is None:
            what = "a masked language model" if options.one_piece == "masked-lm" else "a model whose tokenizer is used"
            raise DataError(f"name {what} with --model")
        names = tuple(columns.split(","))
        table = read_table(data, names)
        if task:
            require_task(task)
        trials = trials_of(task, options.trials)
        source = Source(names, lambda r: _texts(table, names, r), len(table), options, trials, options.model, {})
        blocks = augment(source, out.with_name(f"{out.name}.parts"), Alone())
        rows = merge(blocks, table, out)
    except ValidationError as error:
        sys.exit("\n".join(f"--set {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    except QpipeError as error:
        sys.exit(str(error))
    print(f"{out}: {rows} rows of {len(table)} examples")


def _texts(table: pa.Table, columns: tuple[str, ...], examples: range) -> list[tuple[str, ...]]:
    part = table.slice(examples.start, len(examples))
    return list(zip(*(part[column].to_pylist() for column in columns), strict=True))


if __name__ == "__main__":
    app()
