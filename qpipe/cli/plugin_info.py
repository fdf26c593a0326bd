"""Looking into single plugins, without a run."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ValidationError

from qpipe.discovery import PluginInfo, installed
from qpipe.errors import PluginError, suggest
from qpipe.hookspecs import Specs
from qpipe.host import Host, import_plugin
from qpipe.plugin import Options, Plugin

HOOKS = tuple(name for name in vars(Specs) if name.startswith("qpipe_"))
"""Names of all hooks, in the order of a run."""


def find(name: str) -> PluginInfo:
    """The installed plugin of that name.

    Raises:
        PluginError: there is none; names the nearest.
    """
    available = installed()
    if name not in available:
        raise PluginError(
            f"no plugin named {name!r} is installed{suggest(name, available)}; "
            f"installed: {', '.join(available) or 'none'}"
        )
    return available[name]


def options_model(info: PluginInfo, factory: Any) -> type[Options]:
    """The options of a plugin.

    Raises:
        PluginError: the entry point names something that has none.
    """
    model = getattr(factory, "Options", None)
    if not (isinstance(model, type) and issubclass(model, Options)):
        raise PluginError(
            f"plugin {info.name!r} ({info.distribution} {info.version}, {info.target}) has no `Options` derived from "
            "qpipe.Options; derive the plugin from qpipe.Plugin"
        )
    return model


def plugin_class(info: PluginInfo, factory: Any) -> type[Plugin] | None:
    """The class behind an entry point; None for a function whose options are required, which cannot be called here.

    Raises:
        PluginError: it is not a plugin.
    """
    model = options_model(info, factory)
    if inspect.isclass(factory):
        made: Any = factory
    else:
        try:
            made = type(factory(model()))
        except ValidationError:
            return None
    if not issubclass(made, Plugin):
        raise PluginError(f"plugin {info.name!r}: {info.target} gives a {made.__name__}, not a qpipe.Plugin")
    return made


def describe(info: PluginInfo) -> dict[str, Any]:
    """What a plugin is, as JSON values. Imports it.

    Raises:
        PluginError: it does not import or is no plugin.
    """
    factory = import_plugin(info)
    cls = plugin_class(info, factory)
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "target": info.target,
        "summary": inspect.cleandoc(factory.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
        "hooks": [hook for hook in HOOKS if hasattr(cls, hook)],
        "needs_teacher": bool(cls and cls.needs_teacher),
        "quantizers": quantizers(info, factory),
        "options": options_model(info, factory).model_json_schema(),
    }


def quantizers(info: PluginInfo, factory: Any) -> list[tuple[str, str, str]]:
    """Name, slots and summary of each quantizer that a plugin offers; none where it cannot be made without options."""
    try:
        plugin = factory(options_model(info, factory)())
    except Exception:  # whatever it checks, or reads, when it is made
        return []
    host = Host()
    host.register(info.name, plugin, info.version)
    kinds = [kind for _, call in host.implementations("qpipe_quantizers") for kind in call() or ()]
    return [(kind.name, ", ".join(sorted(kind.slots)), kind.summary) for kind in kinds]


def check(info: PluginInfo) -> list[str]:
    """Import a plugin, and register it in a host of its own where its options have defaults.

    Returns:
        The hooks it implements.

    Raises:
        PluginError: it does not import, is no plugin, cannot be made from its default options, implements an unknown
            hook, or none.
    """
    factory = import_plugin(info)
    cls = plugin_class(info, factory)
    if cls is None:
        return ["options are required, so only the import was checked"]
    model = options_model(info, factory)
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    # Only the hooks matter here, and a class that needs options has the same ones without them.
    try:
        plugin = cls.__new__(cls) if required else factory(model())
    except Exception as error:
        raise PluginError(
            f"plugin {info.name!r} ({info.distribution} {info.version}) cannot be made from its default options: "
            f"{type(error).__name__}: {error}"
        ) from error
    Host().register(info.name, plugin, info.version)
    hooks = [hook for hook in HOOKS if hasattr(cls, hook)]
    if not hooks:
        raise PluginError(f"plugin {info.name!r} ({info.distribution} {info.version}) implements no hook")
    return hooks
