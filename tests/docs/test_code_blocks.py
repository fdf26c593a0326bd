"""The code in README.md, CONTRIBUTING.md, docs/*.md, plugins/*/README.md and launch/README.md.

* python: executed, in order, in one namespace a file.
* console, bash, sh and unnamed blocks: every `qpipe` command must parse with the real command line, its `--set` keys
  must exist, together with the configuration in `examples/` that it names, and `make` targets must be there; so must
  every file in `examples/` and `launch/`, whatever the command. After an HTML comment `<!-- run -->` the commands are
  executed.
* yaml: a valid configuration; one without `model` is merged over the default recipe.
* json and toml are parsed. After `<!-- file: PATH -->` the block is also written to that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from qpipe.cli import app
from qpipe.config import default_recipe, resolve
from qpipe.discovery import installed
from qpipe.errors import ConfigError, PluginError
from qpipe.host import load_plugins
from qpipe.testing.distributed import call_apart

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
    ROOT / "launch" / "README.md",
]
FENCE = re.compile(r"^(?:<!-- (?P<mark>run|file: \S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SHELL = ("console", "bash", "sh", "")
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    mark: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["mark"] or "")
        for m in FENCE.finditer(text)
    ]


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block: lines after `$ ` where there are any, else all; continued lines are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return prompted or [line for line in lines if line.strip()]


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, without redirections and leading assignments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    current: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|<>"):
            while current and re.fullmatch(r"\w+=.*", current[0]):
                current.pop(0)
            if current:
                yield current
            current = []
        else:
            current.append(token)


def parse(arguments: list[str]) -> dict[str, Any]:
    """Parse arguments as `qpipe` does, in a folder where every relative path that they name exists."""
    command: Any = typer.main.get_command(app)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for argument in arguments:
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", argument):
                Path(argument).mkdir(parents=True, exist_ok=True)
        context = command.make_context("qpipe", list(arguments))
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    return dict(context.params)


def ours(argument: str) -> Path | None:
    """The file of this repository that an argument, or the value of `KEY=FILE`, names; None if it names another one.

    Raises:
        FileNotFoundError: it is not there.
    """
    name = argument.rpartition("=")[2]
    if not name.startswith(("examples/", "launch/")):
        return None
    path = ROOT / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not in this repository")
    return path


def check_qpipe(arguments: list[str]) -> None:
    parameters = parse(arguments)
    if "set_" in parameters:
        names = [name for name in (parameters.get("plugins") or "").split(",") if name]
        overrides = parameters["set_"] or ()
        source = ours(str(parameters.get("config") or parameters.get("source") or ""))
        # A configuration file that is not ours may name plugins, whose options `--set` then reaches.
        unseen = [key for key in (text.partition(".")[0] for text in overrides) if key in installed() and not source]
        config = resolve(source, overrides, [*names, *unseen])
        load_plugins({name: o for name, o in config.plugins.items() if name in installed()}, builtins=False)


def check_line(line: str) -> None:
    """Check every `qpipe` and `make` command of a line, and files of this repository in any command."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    try:
        words_of_line = list(commands(line))
    except ValueError:  # unbalanced quotes: output, or prose in an unnamed block
        return
    for words in words_of_line:
        for word in words:
            ours(word)
        if words[0] == "qpipe":
            check_qpipe(words[1:])
        elif words[0] == "make":
            assert targets.issuperset(w for w in words[1:] if "=" not in w), line


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = {**base}
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merge(base[key], value) if both else value
    return result


def check_yaml(text: str) -> None:
    given = yaml.safe_load(text)
    config = resolve(given if "model" in given else merge(default_recipe(), given))
    load_plugins(config.plugins, builtins=False)


def run_line(line: str, folder: Path) -> None:
    """Run a line as a shell does; commands that start no processes of their own, in a fork that has imports done."""
    words = shlex.split(line)
    if words[0] == "qpipe" and words[1] != "launch" and [words] == list(commands(line)):
        call_apart("command_line:main", [{}], 900, {"words": words[1:]})
        return
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def execute(page: Path, block: Block, namespace: dict[str, Any], folder: Path) -> None:
    if block.mark.startswith("file: "):
        target = folder / block.mark.removeprefix("file: ")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text)
        sys.path.extend([str(target.parent.parent)] if target.name == "__init__.py" else [])
    if block.language == "python":
        # Padding makes line numbers in tracebacks those of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True), namespace)
    elif block.language == "yaml":
        check_yaml(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language in SHELL:
        for line in command_lines(block):
            check_line(line)  # may name what the line before has written
            if block.mark == "run":
                run_line(line, folder)
    else:
        assert block.language == "text", f"{page.name}, line {block.line}: a block of unknown language"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks(page, workplace, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        try:
            execute(page, block, namespace, workplace)
        except BaseException as error:
            error.add_note(f"in the block at line {block.line} of {page.relative_to(ROOT)}")
            raise


def test_every_fence_is_recognised():
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), page


def test_a_command_that_fails_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    with pytest.raises(RuntimeError, match=r"(?s)no_such_run.*status 2"):
        run_line("qpipe verify no_such_run", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qpipe launch --gpu 2", "No such option: --gpu"),
        ("qpipe lunch", "No such command 'lunch'"),
        ("qpipe launch -s trian.epochs=1", "trian is not an option; did you mean 'train'"),
        ("make nonsense", "make nonsense"),
    ],
)
def test_wrong_commands_are_noticed(line, message):
    with pytest.raises(Exception) as caught:
        check_line(line)
    assert message in (getattr(caught.value, "message", None) or str(caught.value))


@pytest.mark.parametrize("file", ["examples/glue/none.yaml", "examples/none", "launch/none.sh"])
@pytest.mark.parametrize("command", ["qpipe launch {}", "qpipe inspect plan -s a={}", "python {} a b"])
def test_files_that_are_not_there_are_noticed(command, file):
    with pytest.raises(FileNotFoundError, match=f"{file} is not in this repository"):
        check_line(f"HF_HUB_OFFLINE=1 {command.format(file)} > log")


@pytest.mark.parametrize("command", ["qpipe launch", "qpipe quantize MODEL", "qpipe inspect plan"])
def test_the_configuration_that_a_command_names_is_read(command):
    """It begins from random weights, so that the student cannot begin from a teacher as well, and names no plugin."""
    line = f"{command} examples/mlm/pretrain.yaml"
    check_line(line)
    with pytest.raises(ConfigError, match="random, but the student would start"):
        check_line(f"{line} --set teacher.name=a")
    with pytest.raises(ConfigError, match="kure"):
        check_line(f"{line} --set kure.weight=1")


def test_wrong_configurations_are_noticed():
    with pytest.raises(ValueError, match="epoch"):
        check_yaml("train: {epoch: 1}")
    with pytest.raises(PluginError, match="wieght is not an option"):
        check_yaml("plugins: {kure: {wieght: 1}}")


def test_commands_of_a_line():
    assert list(commands("A=1 qpipe doctor && pip install x | head > f")) == [
        ["qpipe", "doctor"],
        ["pip", "install", "x"],
        ["head"],
        ["f"],
    ]
