"""Finding, building and calling plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
from pydantic import ValidationError

from qpipe.discovery import GROUP
from qpipe.discovery import PluginInfo as PluginInfo
from qpipe.discovery import installed as installed
from qpipe.errors import PluginError, QpipeError, suggest
from qpipe.hookspecs import Specs
from qpipe.plugin import Plugin
from qpipe.validation import describe

BUILTIN_PREFIX = "qpipe.builtin."

BUILTINS: Mapping[str, str] = {
    "models": "qpipe.builtin.models:Models",
    "tasks": "qpipe.builtin.tasks:Tasks",
    "uniform": "qpipe.builtin.uniform:UniformQuantizers",
    "lsq": "qpipe.builtin.lsq:LearnedSteps",
    "lsq_activation": "qpipe.builtin.lsq_activation:LearnedActivationSteps",
    "affine_activation": "qpipe.builtin.affine_activation:LearnedAffine",
    "pact": "qpipe.builtin.pact:LearnedClips",
    "dorefa": "qpipe.builtin.dorefa:Dorefa",
    "binary": "qpipe.builtin.binary:FewLevels",
    "static": "qpipe.builtin.static:StaticQuantizers",
    "modules": "qpipe.builtin.modules:QuantModules",
    "ranges": "qpipe.builtin.ranges:StaticRanges",
    "optim": "qpipe.builtin.optim:Optim",
    "losses": "qpipe.builtin.losses:TaskLoss",
    "log": "qpipe.builtin.log:Log",
    "trackers": "qpipe.builtin.trackers:Trackers",
    "exporters": "qpipe.builtin.exporters:Exporters",
    "report": "qpipe.builtin.report:ReportSections",
}
"""The host's own features, registered through the same hooks as everybody else's, before the plugins asked for."""


ONE_BY_ONE = frozenset(
    f"qpipe_{name}"
    for name in (
        "calibration", "export_metadata", "exporters", "losses", "param_groups", "quant_rules", "quantizers",
        "range_estimators", "report_sections", "restore", "run_error", "state", "tasks", "training_phases",
        "weight_losses",
    )
)  # fmt: skip
"""Hooks whose implementations are called one by one, so that each result has its plugin: there is no call to wrap."""


class _Attributed:
    """A hook implementation that names its plugin in whatever it raises."""

    def __init__(self, impl: Any, label: str) -> None:
        self._impl = impl
        self._label = label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def function(self, *args: Any) -> Any:
        try:
            result = self._impl.function(*args)
            return list(result) if isinstance(result, Iterator) else result  # what a generator raises is named, too
        except Exception as error:
            note = f"raised by plugin {self._label} in hook {self._impl.function.__name__}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise


class _Manager(pluggy.PluginManager):
    labels: dict[str, str]

    def _hookexec(self, hook_name: str, methods: Sequence[Any], kwargs: Mapping[str, Any], firstresult: bool) -> Any:
        attributed: list[Any] = [  # stand-ins with the attributes of pluggy's HookImpl
            m if (m.wrapper or m.hookwrapper) else _Attributed(m, self.labels.get(m.plugin_name, m.plugin_name))
            for m in methods
        ]
        return super()._hookexec(hook_name, attributed, kwargs, firstresult)


class Host:
    """The plugins of one run. Make it with `load_plugins`."""

    def __init__(self) -> None:
        self._manager = _Manager("qpipe")
        self._manager.labels = {}
        self._manager.add_hookspecs(Specs)
        self.plugins: dict[str, Plugin] = {}
        self.versions: dict[str, str] = {}

    @property
    def hook(self) -> Any:
        """The hook relay: `host.hook.qpipe_step_start(run=run, step=step)`."""
        return self._manager.hook

    def register(self, name: str, plugin: Plugin, version: str | None = None) -> None:
        """Add a plugin object; its hooks run before those registered earlier.

        Raises:
            PluginError: a hook is unknown, lacks the `hookimpl` decorator, or asks for an argument that the hook does
                not have.
        """
        self._manager.labels[name] = f"{name!r} {version}" if version else repr(name)
        _check_hooks(name, plugin)
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {name!r}: {error}; is the plugin newer than this qpipe?") from error
        if version is not None:
            self.plugins[name] = plugin
            self.versions[name] = version

    def implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """`(plugin name, callable taking the hook's keyword arguments)` in calling order."""
        caller = getattr(self._manager.hook, hook)
        label = self._manager.labels

        def bind(impl: Any) -> Callable[..., Any]:
            attributed = _Attributed(impl, label.get(impl.plugin_name, impl.plugin_name))
            return lambda **kwargs: attributed.function(*[kwargs[a] for a in impl.argnames])

        return [(impl.plugin_name, bind(impl)) for impl in reversed(caller.get_hookimpls())]

    def is_used(self, hook: str) -> bool:
        """True if any plugin of the run implements the hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def collect(self, hook: str, key: str = "name", **kwargs: Any) -> dict[str, Any]:
        """The contributions of an **all** hook by name, in plugin order.

        Raises:
            PluginError: two plugins offer the same name, or one returned something else than a list.
        """
        result: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for plugin, call in self.implementations(hook):
            for item in self._items(hook, plugin, call(**kwargs)):
                name = getattr(item, key)
                if name in result:
                    label = self._manager.labels
                    raise PluginError(
                        f"{hook}: {name!r} is offered by both {label.get(sources[name])} and {label.get(plugin)}; "
                        "leave one of the two plugins out"
                    )
                result[name], sources[name] = item, plugin
        return result

    def collect_list(self, hook: str, **kwargs: Any) -> list[tuple[str, Any]]:
        """`(plugin name, item)` of an **all** hook whose items have no names.

        Raises:
            PluginError: a plugin returned something else than a list.
        """
        return [
            (plugin, item)
            for plugin, call in self.implementations(hook)
            for item in self._items(hook, plugin, call(**kwargs))
        ]

    def _items(self, hook: str, plugin: str, result: Any) -> Iterable[Any]:
        if result is None:
            return ()
        if not isinstance(result, Iterable):
            raise PluginError(
                f"{hook} of plugin {self._manager.labels[plugin]} returned {type(result).__name__}, not a list; "
                "return a list of them, or yield each"
            )
        return result

    def collect_mappings(self, hook: str, **kwargs: Any) -> dict[str, Mapping[str, Any]]:
        """What each plugin returned from a hook that returns one mapping, by plugin name."""
        results = ((plugin, call(**kwargs)) for plugin, call in self.implementations(hook))
        return {plugin: result for plugin, result in results if result is not None}

    def first(self, hook: str, error: QpipeError, **kwargs: Any) -> Any:
        """The first result of a **first** hook.

        Raises:
            QpipeError: `error`, if every implementation returned None.
        """
        result = getattr(self._manager.hook, hook)(**kwargs)
        if result is None:
            raise error
        return result


def _check_hooks(name: str, plugin: Plugin) -> None:
    hooks = [attribute for attribute in dir(type(plugin)) if attribute.startswith("qpipe_")]
    unknown = [attribute for attribute in hooks if not hasattr(Specs, attribute)]
    if unknown:
        raise PluginError(
            f"plugin {name!r} implements the unknown hook {unknown[0]!r}"
            f"{suggest(unknown[0], [h for h in vars(Specs) if h.startswith('qpipe_')])}; "
            "is the plugin newer than this qpipe?"
        )
    bare = [a for a in hooks if not hasattr(getattr(type(plugin), a), "qpipe_impl")]
    if bare:
        raise PluginError(f"plugin {name!r}: {bare[0]} would never be called; decorate it with @qpipe.hookimpl")
    wrappers = [a for a in hooks if a in ONE_BY_ONE and _wraps(getattr(type(plugin), a).qpipe_impl)]
    if wrappers:
        raise PluginError(
            f"plugin {name!r}: {wrappers[0]} cannot be wrapped, since its implementations are called one by one; "
            "leave `wrapper` out, and return what this plugin contributes"
        )


def _wraps(options: Mapping[str, Any]) -> bool:
    return bool(options.get("wrapper") or options.get("hookwrapper"))


DESCRIBING = ("qpipe_tasks", "qpipe_load_model", "qpipe_model_map", "qpipe_quantize_module")
"""Hooks that say what task and model are; without them another run cannot have the same."""


def describing(host: Host) -> list[str]:
    """Names of the plugins that implement any of the hooks `DESCRIBING`."""
    return [name for name, plugin in host.plugins.items() if any(hasattr(plugin, hook) for hook in DESCRIBING)]


class _Description(Plugin):
    """A plugin, of which only the hooks `DESCRIBING` are called."""

    def __init__(self, plugin: Plugin) -> None:
        super().__init__()
        for hook in DESCRIBING:
            if hasattr(plugin, hook):
                setattr(self, hook, getattr(plugin, hook))


def only_describing(host: Host) -> Host:
    """The built-ins of a host, and of its plugins what they say of task and model."""
    found = load_plugins({})
    for name in reversed(host.plugins):
        found.register(name, _Description(host.plugins[name]), host.versions[name])
    return found


def import_plugin(info: PluginInfo) -> Any:
    """Import what an entry point names.

    Raises:
        PluginError: the import fails; names the plugin, its distribution and the reason.
    """
    try:
        return info.entry_point.load()
    except Exception as error:
        raise PluginError(
            f"plugin {info.name!r} ({info.distribution} {info.version}, {info.target}) failed to import: "
            f"{type(error).__name__}: {error}"
        ) from error


def build_plugin(name: str, factory: Any, options: Mapping[str, Any]) -> Plugin:
    """Make a plugin from its class, or from a function of options with an `Options` attribute.

    Raises:
        PluginError: the options are not valid, or the result is no `Plugin`.
    """
    model = getattr(factory, "Options", None)
    if model is None:
        raise PluginError(f"plugin {name!r}: {factory!r} has no `Options`; derive it from qpipe.Plugin")
    try:
        plugin = factory(model(**options))
    except ValidationError as error:
        raise PluginError(f"options of plugin {name!r}: {describe(error, model)}") from error
    if not isinstance(plugin, Plugin):
        raise PluginError(f"plugin {name!r}: {factory!r} made a {type(plugin).__name__}, not a qpipe.Plugin")
    return plugin


def load_plugins(
    options: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, PluginInfo] | None = None,
    extra: Iterable[tuple[str, Plugin]] = (),
    builtins: bool = True,
) -> Host:
    """Build a host with the built-ins and the plugins named in `options`, in that order.

    Args:
        options: options by plugin name; its order is the calling order.
        found: what is installed; None looks it up. Only plugins named in `options` are imported.
        extra: further plugin objects, for tests.
        builtins: False leaves the built-ins out, to check plugins without importing transformers.

    Raises:
        PluginError: a plugin is not installed (names the nearest), does not import, has wrong options, or implements
            an unknown hook.
    """
    available = installed() if found is None else dict(found)
    built: list[tuple[str, Plugin, str]] = []
    for name in options:
        if name not in available:
            raise PluginError(
                f"no plugin named {name!r} is installed{suggest(name, available)}; "
                f"installed: {', '.join(available) or 'none'}"
            )
        info = available[name]
        built.append((name, build_plugin(name, import_plugin(info), options[name]), info.version))
    host = Host()
    for name, target in BUILTINS.items() if builtins else ():
        point = EntryPoint(name=name, value=target, group=GROUP)
        host.register(BUILTIN_PREFIX + name, point.load()())
    for name, plugin in extra:
        host.register(name, plugin, version="0")
    # pluggy calls the plugin registered last first, so registering backwards makes the calling order that of `options`.
    for name, plugin, version in reversed(built):
        host.register(name, plugin, version)
    return host


def report_error(host: Host, run: Any, error: BaseException) -> None:
    """Tell plugins that the run failed; what they raise is noted on the error, not raised."""
    if run is None:
        return
    for plugin, call in host.implementations("qpipe_run_error"):
        try:
            call(run=run, error=error)
        except Exception as secondary:
            error.add_note(f"qpipe_run_error of plugin {plugin!r} failed too: {secondary}")
