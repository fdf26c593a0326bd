"""The HTML report: sections of the built-ins and of the run's plugins, in one file without outside references."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import ConfigError, PluginError
from qpipe.report import format as fmt
from qpipe.report.inputs import read_config

if TYPE_CHECKING:
    from jinja2 import Environment

    from qpipe.host import Host
    from qpipe.types import ReportSection


@functools.cache
def templates() -> Environment:
    """The templates of the report; everything put into them is escaped unless it is marked as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qpipe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(decimal=fmt.decimal, plain=fmt.plain, size=fmt.size, duration=fmt.duration)
    return environment


def render(template: str, **values: Any) -> str:
    """Render one of the package's templates."""
    return templates().get_template(template).render(**values)


@dataclass(frozen=True)
class _Numbered:
    anchor: str
    section: ReportSection


def load_host(options: Mapping[str, Mapping[str, Any]]) -> tuple[Host, list[str]]:
    """The host with those plugins of a run that can still be loaded.

    Returns:
        The host, and a sentence for each plugin that is missing or does not load.
    """
    from qpipe.host import load_plugins

    usable: dict[str, Mapping[str, Any]] = {}
    problems = []
    for name, values in options.items():
        try:
            load_plugins({name: values})
        except PluginError as error:
            problems.append(f"The run used plugin {name!r}, whose sections are not in this report: {error}")
        else:
            usable[name] = values
    return load_plugins(usable), problems


def collect_sections(host: Host, run_dir: Path) -> tuple[list[ReportSection], list[str]]:
    """The sections of all plugins in order, and a sentence for each plugin that failed to make its own.

    Raises:
        PluginError: two plugins offer a section of the same title.
    """
    sections: dict[str, ReportSection] = {}
    owners: dict[str, str] = {}
    problems = []
    for plugin, call in host.implementations("qpipe_report_sections"):
        try:
            contributed = list(call(run_dir=run_dir) or ())
        except Exception as error:
            # A report is read when something went wrong, so one broken section must not take the others with it.
            problems.append(f"Plugin {plugin!r} could not make its sections: {type(error).__name__}: {error}")
            continue
        for section in contributed:
            if section.title in sections:
                raise PluginError(
                    f"qpipe_report_sections: {section.title!r} is offered by both {owners[section.title]!r} and "
                    f"{plugin!r}; rename one of the two sections"
                )
            sections[section.title], owners[section.title] = section, plugin
    return sorted(sections.values(), key=lambda s: (s.order, s.title)), problems


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    def section(name: str) -> Mapping[str, Any]:
        value = config.get(name)
        return value if isinstance(value, Mapping) else {}

    engine = section("engine")
    facts = {
        "model": section("model").get("name"),
        "task": config.get("task"),
        "plugins": ", ".join(config["plugins"]) or "none",
        "engine": engine.get("name"),
        "ZeRO stage": engine.get("zero") if engine.get("name") == "deepspeed" else None,
        "seed": config.get("seed"),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one HTML file that refers to nothing outside itself.

    Args:
        run_dir: what `qpipe launch --out` wrote; the run may still be going on. What is not there yet is said to be
            missing.
        out: the file to write, default `run_dir/report.html`; replaced if it exists.

    Returns:
        The file written.

    Raises:
        ConfigError: `run_dir` is not a run directory, or `out` is a folder.
        PluginError: two plugins offer a section of the same title.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    target = run_dir / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise ConfigError(f"{str(target)!r} is a folder; name the HTML file to write")
    host, problems = load_host(config["plugins"])
    sections, failures = collect_sections(host, run_dir)
    html = render(
        "document.html.j2",
        name=run_dir.resolve().name,
        facts=_facts(config),
        problems=problems + failures,
        sections=[_Numbered(f"section-{i}", section) for i, section in enumerate(sections, start=1)],
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=_version(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, target)
    return target


def _version() -> str:
    from qpipe import __version__

    return __version__
