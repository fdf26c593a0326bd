"""`docs/config.md`: every key of the configuration, from the pydantic models."""

from __future__ import annotations

import inspect
from pathlib import Path

from pydantic import BaseModel
from reference_text import options_table, table

from qpipe.config import PtqConfig, RuleConfig, RunConfig, default_recipe, dump, resolve

INTRODUCTION = """# Configuration

A run is described by one YAML file (`qpipe launch CONFIG`). A key that is left out has the default below; an unknown
key is an error. `--set section.key=value` overrides a key on the command line, and `--set PLUGIN.key=value` an option
of a plugin. `qpipe inspect plan CONFIG --config` prints the configuration with everything filled in."""


def page(root: Path) -> str:
    """The whole page."""
    sections = {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    plain = [name for name in RunConfig.model_fields if name not in sections]
    rows = [line for line in options_table(RunConfig).splitlines()[2:] if line.split("`")[1] in plain]
    lines = [INTRODUCTION, "\n## Top level\n", table(("key", "type", "default", "meaning"), ()), *rows]
    for name, model in sections.items():
        lines.append(f"\n## `{name}`\n\n{inspect.getdoc(model)}\n\n{options_table(model, f'{name}.')}")
        if name == "quantization":
            lines.append(f"\nEach item of `quantization.rules`:\n\n{options_table(RuleConfig)}")
            lines.append(f"\n`quantization.ptq`: {inspect.getdoc(PtqConfig)}\n\n{options_table(PtqConfig)}")
    lines.append("\n## The default recipe\n\nWhat `qpipe launch` runs without a file, with every default filled in:\n")
    lines.append(f"```yaml\n{dump(resolve(default_recipe()))}```\n")
    return "\n".join(lines)
