"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="YAML configuration. Default: the built-in recipe.", show_default=False),
]
PluginsOption = Annotated[
    str,
    typer.Option("--plugins", "-p", help="Plugins by name, with commas, in calling order, after those of CONFIG."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a configuration key; can be repeated."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", exists=True, file_okay=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def split_names(text: str, option: str = "--plugins") -> list[str]:
    """`"a, b"` as `["a", "b"]`.

    Args:
        text: names with commas.
        option: that they were given to.

    Raises:
        BadParameter: a name is given twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"{option} names {twice!r} twice")
    return names
