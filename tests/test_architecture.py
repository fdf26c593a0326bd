"""Rules on the source itself: what the core may name, who may import whom, and how long things may get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import qpipe

ROOT = Path(__file__).parents[1]
CORE = ROOT / "qpipe"
PLUGIN_SOURCES = sorted(ROOT.glob("plugins/*/src"))

METHODS = re.compile(r"kure|sqwq|ternary|intervention|(?<![a-z])(peg|twn|ti-[omg])(?![a-z])", re.IGNORECASE)
"""Names of methods. The lookarounds keep `jpeg` out."""

FOUNDATION = {
    "config",
    "discovery",
    "errors",
    "files",
    "host",
    "hookspecs",
    "plugin",
    "problems",
    "resuming",
    "run",
    "rundir",
    "schedules",
    "types",
    "validation",
}
LAYERS = (
    {"testing", "cli"},
    {"doctor"},
    {"launching"},
    {"analysis"},
    {"stages"},
    {"builtin"},
    {"engine", "data", "export", "report"},
    {"model", "quant"},
    FOUNDATION,
)
"""From the top down: a package imports from layers below its own, at run time."""

WITHIN = {("export", "data"), ("quant", "model"), ("model", "quant")}
"""Within a layer: verification computes the task's metric from data; hosting modules are models and quantizers in one.
The foundation's files may import each other."""


def text_files(folder: Path) -> list[Path]:
    binary = {".pyc", ".so", ".png", ".safetensors"}
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in binary]


def python_files(*folders: Path) -> list[Path]:
    return [p for folder in folders for p in sorted(folder.rglob("*.py")) if "template" not in p.parts]


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Absolute dotted names: `from qpipe.a import b` gives `qpipe.a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def dependencies() -> dict[tuple[str, str], set[str]]:
    """`(package, package it imports at run time) -> files that do`."""
    found: dict[tuple[str, str], set[str]] = {}
    parts = {p.name.removesuffix(".py") for p in CORE.iterdir()}
    for file in python_files(CORE):
        own = file.relative_to(CORE).parts[0].removesuffix(".py")
        tree = ast.parse(file.read_text())
        skipped = type_checking_only(tree)
        for node, name in imports(tree):
            pieces = name.split(".")
            if pieces[0] != "qpipe" or node in skipped or len(pieces) < 2 or pieces[1] not in parts:
                continue
            if pieces[1] != own:
                found.setdefault((own, pieces[1]), set()).add(str(file.relative_to(ROOT)))
    return found


def layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def allowed(user: str, used: str) -> bool:
    below = layer(used) > layer(user)
    if used == "builtin":  # only the host knows them, by the names of their entry points
        return False
    return below or {user, used} <= FOUNDATION or (user, used) in WITHIN


def test_the_core_names_no_method():
    assert (
        METHODS.search("the TWN lattice") and METHODS.search("ti-g") and not METHODS.search("image.jpeg, anti-gravity")
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files(CORE)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if METHODS.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_package_has_a_layer():
    packages = {p.name.removesuffix(".py") for p in CORE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    data_only = {"recipes"}
    assert packages - {"__init__"} - data_only == set().union(*LAYERS)


def test_layers():
    wrong = {pair: files for pair, files in dependencies().items() if not allowed(*pair)}
    assert not wrong, wrong


def test_built_ins_are_reached_through_hooks():
    """Like every plugin's, their hooks are called by the host: no stage calls a built-in's method."""
    host = (CORE / "host.py").read_text()
    for file in (CORE / "builtin").glob("*.py"):
        if "class " in file.read_text() and "@hookimpl" in file.read_text():
            assert f"qpipe.builtin.{file.stem}:" in host, f"{file.name} is not registered"


@pytest.mark.parametrize("source", PLUGIN_SOURCES, ids=lambda p: p.parent.name)
def test_plugins_use_public_names_only(source):
    problems = []
    for file in python_files(source):
        tree = ast.parse(file.read_text())
        for _, name in imports(tree):
            public = name == "qpipe" or (name.startswith("qpipe.") and name.removeprefix("qpipe.") in qpipe.__all__)
            if name.split(".")[0] == "qpipe" and not public:
                problems.append(f"{file.name}: import {name}")
        for node in ast.walk(tree):
            of_qpipe = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qpipe"
            if of_qpipe and node.attr not in qpipe.__all__:
                problems.append(f"{file.name}: qpipe.{node.attr}")
    assert not problems, problems


def test_plugins_do_not_import_each_other():
    packages = {p.name: source for source in PLUGIN_SOURCES for p in source.iterdir() if p.is_dir()}
    for package, source in packages.items():
        if not (source / package / "__init__.py").exists():
            continue
        for file in python_files(source / package):
            used = {name.split(".")[0] for _, name in imports(ast.parse(file.read_text()))}
            assert not (used & set(packages)) - {package}, file


def test_public_names_are_importable_and_documented():
    for name in qpipe.__all__:
        value = getattr(qpipe, name)
        if isinstance(value, type) or (callable(value) and hasattr(value, "__code__")):
            assert (vars(value).get("__doc__") or value.__doc__ or "").strip(), f"{name} has no docstring"
            if isinstance(value, type):
                assert vars(value).get("__doc__"), f"{name} has only the docstring of its base class"
    assert getattr(qpipe, "__version__").count(".") == 2  # noqa: B009
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qpipe.no_such_name


def test_type_checkers_see_the_same_names():
    tree = ast.parse((CORE / "__init__.py").read_text())
    seen = {name.rpartition(".")[2] for node, name in imports(tree) if node in type_checking_only(tree)}
    assert seen | {"__version__"} == set(qpipe.__all__)


def test_testing_names_are_importable_and_documented():
    testing = import_module("qpipe.testing")
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name


SOURCES = python_files(CORE, *PLUGIN_SOURCES)


def test_files_and_functions_stay_short():
    long = []
    for file in SOURCES:
        text = file.read_text()
        if len(text.splitlines()) > 500:
            long.append(f"{file.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                long.append(f"{file.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, long


def test_importing_qpipe_loads_nothing_heavy():
    code = (
        "import sys, qpipe; print([m for m in ('torch', 'transformers', 'datasets', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_and_hooks_load_no_torch():
    code = "import sys, qpipe.hookspecs, qpipe.types, qpipe.config, qpipe.discovery; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
