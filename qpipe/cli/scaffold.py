"""Writing a new plugin from the template in `qpipe/testing/template`."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from qpipe import __version__
from qpipe.errors import ConfigError, PluginError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def render(name: str, directory: Path) -> Path:
    """Write the distribution `qpipe-NAME` into a new folder of that name in `directory`.

    Returns:
        The folder.

    Raises:
        ConfigError: the name is not allowed, or the folder exists.
        PluginError: an installed plugin has that name.
    """
    check_name(name)
    folder = directory / f"qpipe-{name}"
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another name or --dir")
    import jinja2

    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    module = name.replace("-", "_")
    values = {
        "name": name,
        "module": module,
        "package": f"qpipe_{module}",
        "distribution": f"qpipe-{name}",
        # The suffix keeps the class apart from what the module imports, such as `Tensor` for a plugin named tensor.
        "cls": "".join(part.capitalize() for part in name.removesuffix("-plugin").split("-")) + "Plugin",
        "qpipe_range": _compatible_range(__version__),
    }
    for path, text in _templates(files("qpipe").joinpath("testing/template"), ""):
        target = folder / environment.from_string(path.removesuffix(".jinja")).render(values)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(environment.from_string(text).render(values))
    return folder


def check_name(name: str) -> None:
    """Refuse a name that cannot be a plugin's.

    Raises:
        ConfigError: wrong form, or taken by a section of the configuration; suggests one that is allowed.
        PluginError: an installed plugin has that name.
    """
    from qpipe.config import RunConfig
    from qpipe.discovery import installed

    if not NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        hint = f"; for example {better!r}" if NAME.fullmatch(better) else ""
        raise ConfigError(
            f"{name!r} cannot name a plugin: use lower-case letters, digits and single hyphens, "
            f"starting with a letter{hint}"
        )
    if name in RunConfig.model_fields:
        raise ConfigError(
            f"{name!r} is a section of the configuration, so --set {name}.key would not reach the plugin; "
            f"for example '{name}-plugin'"
        )
    taken = installed().get(name)
    if taken is not None:
        raise PluginError(
            f"a plugin named {name!r} is installed ({taken.distribution} {taken.version}); choose another"
        )


def _compatible_range(version: str) -> str:
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}" if major == 0 else f">={major}.{minor},<{major + 1}"


def _templates(folder: Traversable, prefix: str) -> list[tuple[str, str]]:
    """`(relative path, text)` of every template file; file names are templates too."""
    found: list[tuple[str, str]] = []
    for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if item.is_dir():
            if item.name != "__pycache__":
                found += _templates(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".jinja"):
            found.append((f"{prefix}{item.name}", item.read_text()))
    return found
