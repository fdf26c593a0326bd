"""`docs/plugins-and-quantizers.md`: what rules, `task`, `export.format` and `--plugins` can name."""

from __future__ import annotations

import inspect
from pathlib import Path

from reference_text import options_table, repository_plugins, table

from qpipe.host import BUILTINS, load_plugins
from qpipe.quant.presets import PRESETS
from qpipe.types import Exporter, QuantizerKind, Rule, Task


def page(root: Path) -> str:
    """The whole page."""
    host = load_plugins({})
    kinds: dict[str, QuantizerKind] = host.collect("qpipe_quantizers")
    parts = ["# Quantizers, presets, tasks, exporters and plugins", _presets(), "\n## Quantizers"]
    parts += [_quantizer(kind, "built in") for kind in kinds.values()]
    parts.append(_tasks(host.collect("qpipe_tasks")))
    parts.append(_exporters(host.collect("qpipe_exporters")))
    parts.append("\n## Plugins in this repository\n\nAll but the built-ins run only where `--plugins` names them.")
    for name, (folder, cls) in repository_plugins(root).items():
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        needs = " Needs a teacher." if cls.needs_teacher else ""
        parts.append(f"\n### `{name}`\n\n[{folder}](../{folder}/README.md): {summary}{needs}\n")
        parts.append(options_table(cls.Options, f"{name}."))
        for kind in cls(cls.Options()).qpipe_quantizers() if hasattr(cls, "qpipe_quantizers") else ():
            parts.append(_quantizer(kind, f"from plugin `{name}`").replace("\n###", "\n####", 1))
        for exporter in cls(cls.Options()).qpipe_exporters() if hasattr(cls, "qpipe_exporters") else ():
            parts.append(f"\n#### Format `{exporter.name}`\n\n{exporter.summary} (`export.format`).")
    parts.append("\n## Built-ins\n\nThey use the same hooks as plugins and are always there.\n")
    parts.append(table(("name", "class"), [(f"`{n}`", f"`{t}`") for n, t in BUILTINS.items()]))
    return "\n".join(parts) + "\n"


def _rule(rule: Rule) -> str:
    options = ", ".join(f"{key}: {value}" for key, value in rule.options.items())
    return f"`{rule.site}` → `{rule.quantizer}` ({options})"


def _presets() -> str:
    rows = [(f"`{name}`", "<br>".join(map(_rule, rules))) for name, rules in PRESETS.items()]
    intro = "`quantization.preset` names one. Its rules come first, then those of plugins, then `quantization.rules`."
    return f"\n## Presets\n\n{intro}\n\n" + table(("preset", "rules"), rows)


def _quantizer(kind: QuantizerKind, origin: str) -> str:
    slots = ", ".join(f"`{slot}`" for slot in sorted(kind.slots))
    return f"\n### `{kind.name}`\n\n{kind.summary} ({origin}). Slots: {slots}.\n\n{options_table(kind.options)}"


def _tasks(tasks: dict[str, Task]) -> str:
    rows = []
    for task in tasks.values():
        columns = ", ".join(filter(None, (*task.text_columns, task.tag_column, task.label_column)))
        hub = ":".join(part for part in task.hub if part) if task.hub else ""
        labels = task.num_labels or ("from the data" if task.label_column else "")
        metrics = ", ".join(metric.name for metric in task.metrics)
        rows.append((f"`{task.name}`", task.kind, columns, labels, metrics, hub))
    columns_ = ("task", "kind", "columns", "labels", "metrics (the first selects)", "hub data set")
    return "\n## Tasks\n\n`data.*` overrides columns and source.\n\n" + table(columns_, rows)


def _exporters(exporters: dict[str, Exporter]) -> str:
    rows = [(f"`{exporter.name}`", exporter.summary) for exporter in exporters.values()]
    return "\n## Exporters\n\n`export.format` names one.\n\n" + table(("format", "holds"), rows)
