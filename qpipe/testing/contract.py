"""The contract that every plugin keeps; `check_plugin` tests all of it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import qpipe
from qpipe.config import RunConfig, resolve
from qpipe.errors import PluginError
from qpipe.files import sha256
from qpipe.host import PluginInfo, build_plugin, installed, load_plugins
from qpipe.quant.quantizer import Quantizer
from qpipe.stages.execute import evaluate_run
from qpipe.testing.distributed import call_apart, run_distributed
from qpipe.testing.gradients import compare, write_traces
from qpipe.testing.quantizers import check_quantizer
from qpipe.testing.tiny import tiny_config
from qpipe.types import QuantizerKind


def find_plugin(plugin: Any, name: str | None = None) -> PluginInfo:
    """The installed entry point of a plugin class.

    Raises:
        PluginError: no installed distribution offers it.
    """
    package = plugin.__module__.partition(".")[0]
    for info in installed().values():
        ours = info.target.partition(":")[0].partition(".")[0] == package
        if ours and (name is None or info.name == name) and info.entry_point.load() is plugin:
            return info
    raise PluginError(
        f"{plugin.__module__}.{plugin.__qualname__} is not installed as a qpipe plugin; "
        "add it to [project.entry-points.qpipe] and run `pip install -e .`"
    )


def check_plugin(
    plugin: Any,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    zero3: bool = True,
    **changes: Any,
) -> None:
    """Check the whole contract on a tiny BERT, on CPUs, in about half a minute.

    It loads and refuses unknown options; its quantizers encode what they compute; it trains, exports, and the export
    verifies without qpipe; resuming equals going on; importing it leaves a run without it bitwise unchanged; its
    gradients under ZeRO-3 on two processes equal those of one process.

    Args:
        plugin: the class that the entry point names.
        name: entry point name, if the class has several.
        options: options to test with.
        zero3: False leaves out the distributed part.
        changes: `section__key=value` overrides of the tiny run.

    Raises:
        AssertionError: a part of the contract is broken.
    """
    info = find_plugin(plugin, name)
    given = dict(options or {})
    check_loads(plugin, info, given)
    check_quantizers(info, given, changes.get("quantization__rules", ()))
    with tempfile.TemporaryDirectory(prefix="qpipe-contract-") as scratch:
        folder = Path(scratch)
        config = config_for(folder, info, given, changes)
        check_run(folder, config)
        check_absent(folder, plugin, offers(info, given), changes)
        if zero3:
            check_zero3(folder, config)


def check_rules(rules: Sequence[Mapping[str, Any]], zero3: bool = True, **changes: Any) -> None:
    """Check a run with these quantization rules on a tiny BERT: what `check_plugin` checks of a run with a plugin.

    Args:
        rules: as in `quantization.rules`.
        zero3: False leaves out the distributed part.
        changes: `section__key=value` overrides of the tiny run.

    Raises:
        AssertionError: a part of the contract is broken.
    """
    with tempfile.TemporaryDirectory(prefix="qpipe-contract-") as scratch:
        folder = Path(scratch)
        config = tiny_config(
            folder, quantization__preset=None, quantization__rules=[dict(rule) for rule in rules], **changes
        )
        check_run(folder, config)
        if zero3:
            check_zero3(folder, config)


def check_loads(plugin: Any, info: PluginInfo, options: Mapping[str, Any]) -> None:
    """It builds with its options, has hooks, and refuses unknown options by name."""
    built = build_plugin(info.name, plugin, options)
    again = build_plugin(info.name, plugin, json.loads(built.options.model_dump_json()))
    assert again.options == built.options, "options do not survive a round trip through JSON"
    hooks = [h for h in dir(built) if h.startswith("qpipe_")]
    assert hooks, f"plugin {info.name!r} implements no hook"
    try:
        build_plugin(info.name, plugin, {"no_such_option_": 1})
    except PluginError as error:
        assert "no_such_option_" in str(error)
    else:
        raise AssertionError(f"plugin {info.name!r} accepts unknown options; derive Options from qpipe.Options")
    load_plugins({info.name: options}, {info.name: info})


def check_quantizers(info: PluginInfo, options: Mapping[str, Any], rules: Sequence[Mapping[str, Any]] = ()) -> None:
    """Every weight quantizer it offers keeps the quantizer contract, with its default options.

    One that has none takes those of the first rule that names it.
    """
    host = load_plugins({info.name: options}, {info.name: info})
    for plugin, call in host.implementations("qpipe_quantizers"):
        for kind in (call() or ()) if plugin == info.name else ():
            if "weight" in kind.slots:
                check_quantizer(partial(_build, kind, _options_of(kind, rules)))


def _options_of(kind: QuantizerKind, rules: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    required = [key for key, field in kind.options.model_fields.items() if field.is_required()]
    found = next((rule.get("options", {}) for rule in rules if rule.get("quantizer") == kind.name), None)
    assert not required or found is not None, (
        f"quantizer {kind.name!r} needs options ({', '.join(required)}): call check_plugin with quantization__rules, "
        "one of them for it"
    )
    return found or {} if required else {}


def _build(kind: QuantizerKind, options: Mapping[str, Any]) -> Quantizer:
    return kind.build(kind.options(**options))


def offers(info: PluginInfo, options: Mapping[str, Any]) -> dict[str, set[str]]:
    """Names of what a plugin offers, by hook."""
    host = load_plugins({info.name: options}, {info.name: info})
    return {
        hook: {item.name for name, call in host.implementations(hook) if name == info.name for item in call() or ()}
        for hook in ("qpipe_quantizers", "qpipe_exporters", "qpipe_tasks", "qpipe_range_estimators")
    }


def config_for(folder: Path, info: PluginInfo, options: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """The tiny run with the plugin; with the tiny teacher if the plugin needs one."""
    base = {"teacher__name": str(folder / "teacher")} if info.entry_point.load().needs_teacher else {}
    return tiny_config(folder, {info.name: dict(options)}, **{**base, **changes})


def check_run(folder: Path, config: RunConfig) -> None:
    """It trains and exports; the export verifies; it loads again; resuming from the middle ends in the same weights."""
    run = qpipe.execute(config)
    assert run.results["verified"], "the export does not verify"
    again = evaluate_run(folder / "run")
    assert again == run.results["evaluation"], f"loaded again, the trained run evaluates to {again}, not as it ended"
    whole = weights_hash(folder / "run")
    checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*"))
    resumed = folder / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoints[0], resumed / "checkpoints" / checkpoints[0].name)
    qpipe.execute(config.model_copy(update={"out": str(resumed)}), resume=True)
    assert weights_hash(resumed) == whole, "a resumed run ends in other weights than an uninterrupted one"


def weights_hash(run_dir: Path) -> str:
    """Hash of the trained model and the packed codes."""
    return sha256(run_dir / "model" / "model.safetensors") + sha256(run_dir / "export" / "model.safetensors")


def weights_without(config: dict[str, Any], package: str) -> str:
    """`weights_hash` of a run in a process that has not imported a package."""
    run = resolve(config)
    qpipe.execute(run)
    assert package not in sys.modules, f"{package} was imported although the run does not name it"
    return weights_hash(Path(run.out))


def check_absent(folder: Path, plugin: Any, offered: Mapping[str, set[str]], changes: Mapping[str, Any]) -> None:
    """A run that does not name it ends in the same bits whether or not it was imported.

    Of the changes those are left out that only a run with the plugin can have.
    """
    if changes.get("task") in offered["qpipe_tasks"]:
        return
    possible = dict(changes)
    if possible.get("export__format") in offered["qpipe_exporters"]:
        del possible["export__format"]
    if "quantization__rules" in possible:
        rules = [dict(rule) for rule in possible["quantization__rules"]]
        possible["quantization__rules"] = [rule for rule in rules if not _needs(rule, offered)]
    config = tiny_config(folder, {}, **possible)
    here = config.model_copy(update={"out": str(folder / "imported")})
    qpipe.execute(here)
    there = config.model_copy(update={"out": str(folder / "fresh")}).model_dump(mode="json")
    package = plugin.__module__.partition(".")[0]
    fresh = call_apart("qpipe.testing.contract:weights_without", [{}], 600, {"config": there, "package": package})
    assert fresh == weights_hash(folder / "imported"), "importing the plugin changes other runs"


def _needs(rule: Mapping[str, Any], offered: Mapping[str, set[str]]) -> bool:
    """Whether a rule names a quantizer or a range estimator that is offered."""
    named = {value for value in (rule.get("options") or {}).values() if isinstance(value, str)}
    return rule.get("quantizer") in offered["qpipe_quantizers"] or bool(named & offered["qpipe_range_estimators"])


def check_zero3(folder: Path, config: RunConfig) -> None:
    """Two processes under ZeRO-3 have the gradients of one process in every step, on equal weights."""
    train = config.train.model_copy(update={"learning_rate": 1e-12})
    single = config.model_copy(update={"train": train, "out": str(folder / "compared")})
    sharded = single.model_dump(mode="json")
    sharded["engine"] |= {"name": "deepspeed", "zero": 3, "config_file": str(zero3_settings(folder))}
    steps = config.train.max_steps or 2  # all of them, so that every phase of a plugin comes up
    write_traces({"one": single.model_dump(mode="json")}, steps, str(folder))
    run_distributed("qpipe.testing.gradients:write_traces", cases={"zero3": sharded}, steps=steps, folder=str(folder))
    compare(load_file(folder / "one.safetensors"), load_file(folder / "zero3.safetensors"))


def zero3_settings(folder: Path) -> Path:
    """DeepSpeed settings that partition even the smallest parameters."""
    path = folder / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return path
