import ast
import json
import re
import sys
import tomllib

import pytest

from qpipe.cli import scaffold
from qpipe.discovery import installed
from qpipe.errors import ConfigError, PluginError
from qpipe.testing import contract
from qpipe.testing.contract import check_quantizers

GOOD = '''
import qpipe
from pydantic import Field

class Good(qpipe.Plugin):
    """Does good.

    More about it.
    """

    class Options(qpipe.Options):
        weight: float = Field(0.5, ge=0, description="factor")
        mode: str | None = None
        needed: int

    needs_teacher = True

    @qpipe.hookimpl
    def qpipe_losses(self):
        return []
'''


def test_list_names_plugins_without_importing_them(cli, installed_plugin):
    installed_plugin("broken", "broken_mod:Broken", "raise RuntimeError('imported')")
    result = cli("plugins", "list")
    assert result.code == 0
    assert ["broken", "qpipe-broken", "1.2", "broken_mod:Broken"] in [line.split() for line in result.out.splitlines()]
    rows = json.loads(cli("plugins", "list", "--json").out)
    assert {"name": "broken", "distribution": "qpipe-broken", "version": "1.2", "target": "broken_mod:Broken"} in rows


def test_two_distributions_with_one_name(cli, installed_plugin):
    installed_plugin("twice", "one_mod:A", "", "dist-one")
    installed_plugin("twice", "two_mod:B", "", "dist-two")
    result = cli("plugins", "list")
    assert result.code == 1
    assert "'twice' is offered by both" in result.err and "dist-one" in result.err and "dist-two" in result.err


def test_show(cli, installed_plugin):
    installed_plugin("good", "good_mod:Good", GOOD)
    result = cli("plugins", "show", "good")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "Does good." in lines and "hooks: qpipe_losses" in lines and "needs a teacher" in lines
    assert "good.weight number >= 0 0.5 factor" in lines
    assert "good.mode string | null null" in lines
    assert "good.needed integer required" in lines
    described = json.loads(cli("plugins", "show", "good", "--json").out)
    assert described["hooks"] == ["qpipe_losses"] and described["options"]["required"] == ["needed"]


NEEDY = """
from collections.abc import Iterable

from pydantic import Field

from qpipe import Options, Plugin, QTensor, Quantizer, QuantizerKind, hookimpl
import torch

made = []


class Grid(Quantizer):
    def encode(self, value):
        return QTensor(torch.zeros_like(value), torch.ones(1, 1), torch.zeros(1), 8)

    def quantize(self, value, out=None):
        return torch.zeros_like(value) if out is None else out.zero_()


class GridOptions(Options):
    bits: int


def grid(options):
    made.append(options.bits)
    return Grid()


class NeedyOptions(Options):
    kinds: list[str] = Field(default_factory=list)
    offers: bool = True


class Needy(Plugin):
    Options = NeedyOptions

    @hookimpl
    def qpipe_quantizers(self):
        if not self.options.offers:
            return None
        return [QuantizerKind("grid", grid, GridOptions, frozenset({"weight"}), "a grid")]
"""


def test_show_of_quantizers_and_of_what_is_not_said(cli, installed_plugin):
    """Not the description of the base class; nor is an option required whose default is made anew."""
    installed_plugin("needy", "needy_mod:Needy", NEEDY)
    result = cli("plugins", "show", "needy")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "grid weight a grid" in lines and "needy.kinds array made anew" in lines
    assert "Base class" not in result.out


def test_show_of_a_plugin_that_cannot_be_made_without_options(cli, installed_plugin):
    code = NEEDY.replace(
        "class Needy(Plugin):", "class Needy(Plugin):\n    def __init__(self, options):\n        open('absent')\n"
    )
    installed_plugin("needy", "closed_mod:Needy", code)
    result = cli("plugins", "show", "needy")
    assert result.code == 0 and "needy.kinds" in result.out


def test_quantizers_that_need_options_are_checked_with_those_of_a_rule(installed_plugin, monkeypatch):
    installed_plugin("needy", "needy_mod:Needy", NEEDY)
    info = installed()["needy"]
    with pytest.raises(AssertionError, match=r"quantizer 'grid' needs options \(bits\): .* quantization__rules"):
        check_quantizers(info, {})
    monkeypatch.setattr(contract, "check_quantizer", lambda build: build())
    check_quantizers(info, {}, [{"site": "x", "quantizer": "grid", "options": {"bits": 3}}])
    assert sys.modules["needy_mod"].made == [3]
    check_quantizers(info, {"offers": False})


def test_rules_that_need_a_plugin():
    """A run without it has none of them."""
    offered = {"qpipe_quantizers": {"grid"}, "qpipe_range_estimators": {"half"}}
    own = [{"quantizer": "grid"}, {"quantizer": "uniform-activation", "options": {"range": "half"}}]
    others = [{"quantizer": "uniform", "options": {"bits": 4}}, {"quantizer": "none"}]
    assert [contract._needs(rule, offered) for rule in [*own, *others]] == [True, True, False, False]


def test_a_new_plugin_where_it_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").touch()
    result = cli("plugins", "new", "my-penalty", "--dir", tmp_path / "file")
    assert result.code == 1 and "is a file, not a folder" in result.err


def test_show_of_an_unknown_name_suggests(cli, installed_plugin):
    installed_plugin("good", "good_mod:Good", GOOD)
    result = cli("plugins", "show", "goood")
    assert result.code == 1 and "did you mean 'good'?" in result.err


HOOK = "import qpipe\nclass Bad(qpipe.Plugin):\n    @qpipe.hookimpl\n    def {}:\n        pass"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no such library')", "failed to import: RuntimeError: no such library"),
        ("", "has no attribute 'Bad'"),
        ("class Bad:\n    pass", "has no `Options`"),
        ("import qpipe\nclass Bad(qpipe.Plugin):\n    pass", "implements no hook"),
        (HOOK.format("qpipe_lossess(self)"), "qpipe_lossess"),
        (HOOK.format("qpipe_losses(self, wrong)"), "wrong"),
    ],
)
def test_check_names_what_fails_and_why(cli, installed_plugin, monkeypatch, code, reason):
    installed_plugin("bad", "bad_mod:Bad", code)
    installed_plugin("good", "good_mod:Good", GOOD)
    monkeypatch.delitem(sys.modules, "bad_mod", raising=False)
    result = cli("plugins", "check")
    assert result.code == 1
    failures = [part for part in re.split(r"^(?=FAIL|ok)", result.out, flags=re.MULTILINE) if "'bad'" in part]
    assert len(failures) == 1 and failures[0].startswith("FAIL") and reason in failures[0]
    assert any(line.startswith("ok    good (qpipe-good 1.2)") for line in result.out.splitlines())


@pytest.mark.parametrize(
    ("given", "suggested"), [("My_Plugin", "my-plugin"), ("4bits", "bits"), ("a--b", "a-b"), ("-", None)]
)
def test_bad_names(tmp_path, given, suggested):
    with pytest.raises(ConfigError) as caught:
        scaffold.render(given, tmp_path)
    assert repr(given) in str(caught.value) and "lower-case letters" in str(caught.value)
    assert (f"for example {suggested!r}" in str(caught.value)) == (suggested is not None)
    assert not list(tmp_path.iterdir())


def test_a_section_of_the_configuration_cannot_name_a_plugin(tmp_path):
    with pytest.raises(ConfigError, match="'train' is a section"):
        scaffold.render("train", tmp_path)


def test_name_of_an_installed_plugin(tmp_path, installed_plugin):
    installed_plugin("good", "good_mod:Good", GOOD)
    with pytest.raises(PluginError, match="is installed"):
        scaffold.render("good", tmp_path)


def test_existing_folder(cli, tmp_path):
    (tmp_path / "qpipe-mine").mkdir()
    result = cli("plugins", "new", "mine", "--dir", tmp_path)
    assert result.code == 1 and "exists" in result.err


def test_new_writes_a_package_with_nothing_left_to_fill_in(cli, tmp_path):
    result = cli("plugins", "new", "my-penalty", "--dir", tmp_path)
    assert result.code == 0
    folder = tmp_path / "qpipe-my-penalty"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["qpipe"] == {"my-penalty": "qpipe_my_penalty:MyPenaltyPlugin"}
    assert project["dependencies"] == ["qpipe>=0.1,<0.2"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "pyproject.toml",
        "README.md",
        "__init__.py",
        "py.typed",
        "test_my_penalty.py",
    }
    for path in files:
        assert "{{" not in path.read_text() and "jinja" not in str(path)
        if path.suffix == ".py":
            ast.parse(path.read_text())


def test_template_ships_with_the_package():
    from importlib.resources import files

    assert files("qpipe").joinpath("testing/template/pyproject.toml.jinja").is_file()
    assert len(scaffold._templates(files("qpipe").joinpath("testing/template"), "")) == 5
