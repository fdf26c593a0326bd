"""The hooks: each has a user and a faithful manual, and errors name the plugin they come from."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

from qpipe import Loss, Options, Plugin, PluginError, hookimpl
from qpipe.discovery import PluginInfo
from qpipe.hookspecs import Specs
from qpipe.host import ONE_BY_ONE, build_plugin, load_plugins

ROOT = Path(__file__).parents[1]
HOOKS = {name: function for name, function in vars(Specs).items() if name.startswith("qpipe_")}
MANUAL = ROOT / "docs" / "hooks.md"


@cache
def implemented() -> dict[str, set[str]]:
    """Hooks that a class in the built-ins or in a plugin of this repository implements, with the files."""
    found: dict[str, set[str]] = {}
    files = [*(ROOT / "qpipe" / "builtin").glob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("hookimpl" in ast.unparse(d) for d in node.decorator_list):
                found.setdefault(node.name, set()).add(str(file.relative_to(ROOT)))
    return found


def arguments(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("hook", HOOKS)
def test_has_a_real_user(hook):
    assert implemented().get(hook), f"nothing in qpipe/builtin or plugins/ implements {hook}"


def test_every_implementation_is_a_known_hook():
    assert set(implemented()) <= set(HOOKS)


def test_there_are_hooks():
    assert len(HOOKS) > 20 and "qpipe_losses" in HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_docstring_says_how_results_combine(hook):
    text = inspect.getdoc(HOOKS[hook]) or ""
    assert re.search(r"\((first|all|event)\b", text), f"{hook}: {text!r}"
    first = HOOKS[hook].qpipe_spec["firstresult"]
    assert first == ("(first" in text), f"{hook}: the docstring and `firstresult` disagree"


@pytest.mark.parametrize("hook", HOOKS)
def test_manual_has_the_exact_arguments(hook):
    text = MANUAL.read_text()
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
    (section,) = [s for s in sections if re.match(rf"`?{hook}\b", s)]
    signature = re.search(rf"{hook}\(([^)]*)\)", section)
    assert signature, f"no signature of {hook} in docs/hooks.md"
    documented = [part.split(":")[0].strip() for part in signature[1].split(",") if part.strip()]
    assert [name for name in documented if name != "self"] == arguments(HOOKS[hook])


class Named(Plugin):
    @hookimpl
    def qpipe_losses(self):
        return [Loss("extra", lambda step: step.output)]


class Failing(Plugin):
    @hookimpl
    def qpipe_losses(self, run):
        raise ValueError("deep inside")

    @hookimpl
    def qpipe_step_start(self, run, step):
        raise ValueError("deep inside")


def test_a_name_offered_twice_names_both_plugins():
    host = load_plugins({}, extra=[("one", Named()), ("two", Named())])
    with pytest.raises(PluginError, match="'extra' is offered by both 'two' 0 and 'one' 0; leave one of the two"):
        host.collect("qpipe_losses", run=None)


def test_a_name_of_the_host_cannot_be_offered_again():
    class Task(Plugin):
        @hookimpl
        def qpipe_losses(self):
            return [Loss("task", lambda step: step.output)]

    host = load_plugins({}, extra=[("mine", Task())])
    run = type("Run", (), {"task": type("Task", (), {"kind": "classification"})})
    with pytest.raises(PluginError, match=r"'task' is offered by both .*'mine' 0.*losses"):
        host.collect("qpipe_losses", run=run)


@pytest.mark.parametrize("call", ["collect", "hook"])
def test_an_exception_names_plugin_version_and_hook(call):
    host = load_plugins({}, extra=[("shaky", Failing())])
    hook = "qpipe_losses" if call == "collect" else "qpipe_step_start"
    with pytest.raises(ValueError, match="deep inside") as caught:
        if call == "collect":
            host.collect("qpipe_losses", run=type("Run", (), {"task": type("T", (), {"kind": "regression"})}))
        else:
            host.hook.qpipe_step_start(run=None, step=None)
    assert caught.value.__notes__ == [f"raised by plugin 'shaky' 0 in hook {hook}"]


def test_what_a_generator_raises_is_named_too():
    class Late(Plugin):
        @hookimpl
        def qpipe_weight_losses(self, run):
            raise ValueError("deep inside")
            yield

    with pytest.raises(ValueError, match="deep inside") as caught:
        load_plugins({}, extra=[("late", Late())]).collect("qpipe_weight_losses", run=None)
    assert caught.value.__notes__ == ["raised by plugin 'late' 0 in hook qpipe_weight_losses"]


@pytest.mark.parametrize("hook", ["qpipe_losses", "qpipe_quant_rules"])
def test_one_item_in_place_of_a_list_is_refused(hook):
    class Single(Plugin):
        @hookimpl
        def qpipe_losses(self):
            return Loss("extra", lambda step: step.output)

        @hookimpl
        def qpipe_quant_rules(self):
            return Loss("extra", lambda step: step.output)

    host = load_plugins({}, extra=[("single", Single())], builtins=False)
    collect = host.collect if hook == "qpipe_losses" else host.collect_list
    with pytest.raises(PluginError, match=f"{hook} of plugin 'single' 0 returned Loss, not a list"):
        collect(hook, run=None, sites=())


def test_unknown_hook_suggests_the_nearest():
    class Old(Plugin):
        @hookimpl
        def qpipe_lossess(self, run):
            return ()

    with pytest.raises(PluginError, match=r"plugin 'old'.*unknown hook 'qpipe_lossess'; did you mean 'qpipe_losses'"):
        load_plugins({}, extra=[("old", Old())])


def test_undecorated_method_with_an_unknown_name_is_refused():
    class Forgot(Plugin):
        def qpipe_lossess(self, run):
            return ()

    with pytest.raises(PluginError, match="unknown hook 'qpipe_lossess'; did you mean 'qpipe_losses'"):
        load_plugins({}, extra=[("forgot", Forgot())])


def test_undecorated_hook_is_refused():
    """Without the decorator pluggy would never call it, silently."""

    class Forgot(Plugin):
        def qpipe_losses(self, run):
            return ()

    with pytest.raises(PluginError, match=r"plugin 'forgot'.*qpipe_losses.*hookimpl"):
        load_plugins({}, extra=[("forgot", Forgot())])


def test_hooks_that_are_called_one_by_one_cannot_be_wrapped():
    class Around(Plugin):
        @hookimpl(wrapper=True)
        def qpipe_losses(self, run):
            return (yield)

    with pytest.raises(PluginError, match="plugin 'around': qpipe_losses cannot be wrapped"):
        load_plugins({}, extra=[("around", Around())])

    class Watch(Plugin):
        @hookimpl(wrapper=True)
        def qpipe_step_start(self, run):
            return (yield)

    load_plugins({}, extra=[("watch", Watch())])


def test_it_is_known_which_hooks_are_called_one_by_one():
    sources = "\n".join(path.read_text() for path in (ROOT / "qpipe").rglob("*.py"))
    calls = r'(?:collect|collect_list|collect_mappings|implementations)\(\s*"(qpipe_\w+)'
    assert set(re.findall(calls, sources)) == ONE_BY_ONE


def test_unknown_argument_of_a_hook_is_refused():
    class Greedy(Plugin):
        @hookimpl
        def qpipe_losses(self, run, world):
            return ()

    with pytest.raises(PluginError, match=r"(?s)plugin 'greedy'.*world"):
        load_plugins({}, extra=[("greedy", Greedy())])


def test_any_subset_of_arguments_in_any_order():
    calls = []

    class Subset(Plugin):
        @hookimpl
        def qpipe_step_end(self, metrics, run):
            calls.append((metrics, run))

    host = load_plugins({}, extra=[("subset", Subset())], builtins=False)
    host.hook.qpipe_step_end(run="run", step="step", metrics={"loss": 1.0})
    assert calls == [({"loss": 1.0}, "run")]


class Options1(Options):
    weight: float = 1.0


class Tunable(Plugin):
    Options = Options1


def test_unknown_option_names_plugin_and_nearest_key():
    with pytest.raises(
        PluginError, match="options of plugin 'tunable': wieght is not an option; did you mean 'weight'"
    ):
        build_plugin("tunable", Tunable, {"wieght": 2})
    with pytest.raises(PluginError, match=r"weight = 'heavy'"):
        build_plugin("tunable", Tunable, {"weight": "heavy"})


def test_what_is_no_plugin_is_refused():
    with pytest.raises(PluginError, match=r"has no `Options`; derive it from qpipe.Plugin"):
        build_plugin("odd", lambda options: None, {})


def entry(name: str, target: str) -> PluginInfo:
    from importlib.metadata import EntryPoint

    point = EntryPoint(name=name, value=target, group="qpipe")
    return PluginInfo(name=name, distribution=f"qpipe-{name}", version="9", target=target, entry_point=point)


def test_unknown_plugin_suggests_the_nearest():
    with pytest.raises(PluginError, match="no plugin named 'stedy' is installed; did you mean 'steady'"):
        load_plugins({"stedy": {}}, {"steady": entry("steady", "json:loads")})


def test_a_plugin_that_fails_to_import_says_why():
    with pytest.raises(
        PluginError, match=r"'gone' \(qpipe-gone 9, no_such_module_here:X\) failed to import: ModuleNotFound"
    ):
        load_plugins({"gone": {}}, {"gone": entry("gone", "no_such_module_here:X")})


def test_plugins_are_called_in_the_order_named(tmp_path, monkeypatch):
    (tmp_path / "orderly.py").write_text(
        "from qpipe import Plugin, hookimpl\n"
        "CALLS = []\n"
        "class A(Plugin):\n"
        "    @hookimpl\n"
        "    def qpipe_run_start(self, run): CALLS.append(type(self).__name__)\n"
        "class B(A):\n"
        "    @hookimpl\n"
        "    def qpipe_run_start(self, run): CALLS.append(type(self).__name__)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {"a": entry("a", "orderly:A"), "b": entry("b", "orderly:B")}
    import orderly

    for order in (["a", "b"], ["b", "a"]):
        orderly.CALLS.clear()
        host = load_plugins({name: {} for name in order}, found, builtins=False)
        host.hook.qpipe_run_start(run=None)
        assert orderly.CALLS == [name.upper() for name in order]
        assert [name for name, _ in host.implementations("qpipe_run_start")] == order


def test_only_named_plugins_are_imported():
    host = load_plugins({}, {"gone": entry("gone", "no_such_module_here:X")})
    assert host.plugins == {}
