"""`Instruments`: the sites of a model, and ways to put quantizers, taps and captures there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qpipe.errors import ModelError, SiteError, suggest
from qpipe.model.attention import SLOTS, VISIBLE, AttentionSites, install
from qpipe.model.taps import Tap, add_sorted, always
from qpipe.quant.hosts import QuantPart, host_class
from qpipe.quant.modules import QuantEmbedding, QuantModule
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.sums import EmbeddingSums
from qpipe.types import ModelMap, SignalKind, Site, Slot, TapStage

OUTPUTS: frozenset[SignalKind] = frozenset({"logits", "hidden_states"})
"""Signals that are part of a model's output and need no capture within it."""

HostClass = Callable[[nn.Module], "type[nn.Module] | None"]


class Instruments:
    """Sites of one model. Changes a module's class only where something is put at one of its sites.

    Attributes:
        model: the model.
        map: where its parts are.
        context: shared by its quantizers and taps.
        sites: every site it has, by `path:slot`.
        tapped: names of the sites where `add_tap` put something.
    """

    def __init__(self, model: nn.Module, model_map: ModelMap, host_class: HostClass) -> None:
        self.model = model
        self.map = model_map
        self.context = QuantContext()
        self._host_class = host_class
        self._attention: dict[str, AttentionSites] = {}
        self._sums: EmbeddingSums | None = None
        self._wanted: frozenset[SignalKind] = frozenset()
        self._store: dict[tuple[str, int], Tensor] = {}
        self._capturing = False
        self._watching = False
        self.tapped: set[str] = set()
        self.sites = self._discover()

    def _discover(self) -> dict[str, Site]:
        found: dict[str, Site] = {}
        for path, module in self.model.named_modules():
            cls = self._host_class(module)
            if cls is None:
                continue
            if not issubclass(cls, QuantModule):
                raise ModelError(f"{cls.__name__} is offered to host {path} but does not derive from qpipe.QuantModule")
            for slot in cls.slots:
                weight = module._parameters.get("weight")
                if slot == "weight" and weight is None:
                    continue
                shape = tuple(weight.shape) if slot == "weight" and weight is not None else ()
                site = Site(path, slot, type(module).__name__, shape, cls.by_name)
                found[site.name] = site
        for path in self.map.attention:
            for slot in SLOTS:
                site = Site(path, slot, type(self.model.get_submodule(path)).__name__)
                found[site.name] = site
        mapped = [name for names in self.map.sites.values() for name in names]
        # A part, where a projection is made of several modules.
        mapped += [f"{path}:output" for path in self.map.attention_output]
        return found | {name: self._mapped_site(name) for name in mapped if name not in found}

    def _mapped_site(self, name: str) -> Site:
        """A site that only the map can tell: a sum of embeddings, a residual stream, the output of a whole part."""
        path, _, slot = name.rpartition(":")
        places: dict[str, tuple[tuple[str, ...], Slot]] = {
            "sum": (self.map.embeddings[1:-1], "sum"),
            "stream": (self.map.norms, "stream"),
            "output": (tuple(n for n, m in self.model.named_modules() if m._modules), "output"),
        }
        paths, known = places.get(slot, ((), "output"))
        if path not in paths:
            raise ModelError(
                f"the model map names a site {name!r} that {type(self.model).__name__} does not have; it can name "
                "`sum` between the first and last of its embeddings, `stream` at its norms, `output` of parts, and the "
                "sites of modules that host quantizers"
            )
        return Site(path, known, type(self.model.get_submodule(path)).__name__, (), known != "sum")

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            SiteError: there is none; names the nearest.
        """
        if name not in self.sites:
            raise SiteError(f"the model has no site {name!r}{suggest(name, self.sites)}")
        return self.sites[name]

    def module(self, site: Site) -> QuantModule | AttentionSites:
        """The hosting module of a site; makes it one if it is not yet."""
        if site.slot in SLOTS:
            return self.attention(site.path)
        if site.slot == "sum":
            return self._summed(site.path)
        return self._adopted(site.path)

    def _adopted(self, path: str) -> QuantModule:
        module = self.model.get_submodule(path)
        if not isinstance(module, QuantModule):
            cls: Any = self._host_class(module) or host_class(QuantPart, type(module))
            cls.adopt(module, path, self.context)
        return module  # type: ignore[return-value]

    def _summed(self, path: str) -> QuantModule:
        """The embedding at a sum; the first call takes the additions over from the model."""
        if self._sums is None:
            tables = [self._adopted(table) for table in self.map.embeddings]
            parent = self.model.get_submodule(path.rpartition(".")[0])
            self._sums = EmbeddingSums(parent, [t for t in tables if isinstance(t, QuantEmbedding)])
        table = self._adopted(path)
        assert isinstance(table, QuantEmbedding)
        self._sums.use(table)
        return table

    def attention(self, path: str) -> AttentionSites:
        """The sites within an attention module; the first call switches the model to qpipe's attention function."""
        if not self._attention:
            self._attention = install(self.model, self.map.attention, self.context)
        return self._attention[path]

    def silent_attention(self) -> str | None:
        """Path of the first attention module that has not run, though the model has been called; None without one."""
        return next((path for path, sites in self._attention.items() if not sites.called), None)

    @property
    def computes_attention(self) -> bool:
        """True if the model has been switched to qpipe's attention function."""
        return bool(self._attention)

    def put(self, site: Site, quantizer: Quantizer) -> None:
        """Put a quantizer at a site."""
        quantizer.attach(self.context, site.name)
        self.module(site).host(site.slot, quantizer)

    def quantizers(self) -> dict[str, Quantizer]:
        """All quantizers by site name."""
        return {m.site: m for m in self.model.modules() if isinstance(m, Quantizer) and m.site}

    def add_tap(
        self,
        site_name: str,
        stage: TapStage,
        fn: Callable[[Tensor], Tensor],
        active: Callable[[], bool] = always,
        in_evaluation: bool = False,
    ) -> None:
        """Put a function at a site. It runs in training steps, while `active()` is true.

        Args:
            site_name: `path:slot`.
            stage: OBSERVE sees the model's own value, REPLACE changes it, QUANTIZE comes last.
            fn: tensor to tensor of the same shape.
            active: asked on every call; an active tap at scores or probs makes the model build attention maps. A model
                that cannot build them is refused in the first forward pass, whatever `active` says then.
            in_evaluation: it runs also in those evaluations during training for which a plugin asks for signals of the
                teacher (`Signals.evaluation`); `run.step` then holds the batch and these signals.

        Raises:
            SiteError: the model has no such site, or the site is a weight.
        """
        site = self.site(site_name)
        if site.slot == "weight":
            raise SiteError(f"taps see activations; {site_name!r} is a weight (use a quantizer or a weight loss)")
        self.tapped.add(site_name)
        self._add_tap(site, Tap(stage, fn, active, in_evaluation))

    def _add_tap(self, site: Site, tap: Tap) -> None:
        add_sorted(self.module(site).taps_at(site.slot), tap)

    # --- signals ------------------------------------------------------------------------------------------------------

    def enable_capture(self) -> None:
        """Install the captures of all signals; they cost nothing while not wanted."""
        if self._capturing:
            return
        self._capturing = True
        for layer, path in enumerate(self.map.attention):
            for kind in ("scores", "probs", "context"):
                self._capture(f"{path}:{kind}", kind, layer)
            add_sorted(self.attention(path).taps_at(VISIBLE), self._keeper("visible", layer))
        for layer, path in enumerate(self.map.attention_output):
            self._capture(f"{path}:output", "attention_output", layer)

    def _capture(self, site_name: str, kind: SignalKind, layer: int) -> None:
        self._add_tap(self.site(site_name), self._keeper(kind, layer))

    def _keeper(self, kind: SignalKind, layer: int) -> Tap:
        """What captures one signal while it is wanted."""

        def keep(x: Tensor) -> Tensor:
            self._store[kind, layer] = x
            return x

        return Tap(TapStage.OBSERVE, keep, lambda: kind in self._wanted, capture=True)

    def want(self, kinds: frozenset[SignalKind], store: dict[tuple[str, int], Tensor]) -> None:
        """Capture `kinds` into `store` from the next forward pass on.

        Raises:
            ModelError: the model has no attention that could be captured, or captures were not enabled.
        """
        places = {"attention_output": self.map.attention_output}
        missing = {kind for kind in kinds - OUTPUTS if not places.get(kind, self.map.attention)}
        if missing:
            raise ModelError(
                f"{type(self.model).__name__} offers no {', '.join(sorted(missing))}: its attention is not known. "
                "Use a model of a known family, or implement qpipe_model_map"
            )
        self._refuse_repeated(kinds - {"logits"})
        if kinds - OUTPUTS and not self._capturing:
            raise ModelError(
                f"{', '.join(sorted(kinds - OUTPUTS))} of {type(self.model).__name__} were not announced: before any "
                "step, while run.step is None, qpipe_signals has to say what any step will need"
            )
        if "hidden_states" in kinds:
            self._watch_last_block()
        self._wanted, self._store = kinds, store

    def _refuse_repeated(self, kinds: frozenset[SignalKind]) -> None:
        """Signals are kept by the number of their block: one that runs several times would keep its last call only."""
        config = getattr(self.model, "config", None)
        layers = getattr(config, "num_hidden_layers", None)
        blocks = len(self.map.blocks)
        if kinds and blocks and isinstance(layers, int) and blocks < layers:
            raise ModelError(
                f"{type(self.model).__name__} runs {layers} layers in {blocks} block(s), whose "
                f"{', '.join(sorted(kinds))} cannot be told apart: take signals of its logits alone, or a model with a "
                "block for each layer"
            )

    def _watch_last_block(self) -> None:
        """Keep what the last block returns: of decoders, transformers gives it after the final normalisation only.

        Put in place by the first demand, so that the hook comes after those of an engine, as transformers' own do.
        """
        if self._watching or not self.map.blocks:
            return
        self._watching = True
        last = len(self.map.blocks)

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self.context.taps_active and "hidden_states" in self._wanted:
                self._store["hidden_states", last] = output[0] if isinstance(output, tuple) else output

        self.model.get_submodule(self.map.blocks[-1]).register_forward_hook(keep)

    def take_outputs(self, output: Any, kinds: frozenset[SignalKind], store: dict[tuple[str, int], Tensor]) -> None:
        """Add the signals that are part of the model's output to those captured on the way to it.

        Raises:
            ModelError: one was not captured in every layer, or the model gives no hidden states.
        """
        if "logits" in kinds:
            store["logits", 0] = output.logits
        for kind in sorted(kinds - OUTPUTS):
            paths = self.map.attention_output if kind == "attention_output" else self.map.attention
            missing = [path for layer, path in enumerate(paths) if (kind, layer) not in store]
            if missing:
                raise ModelError(
                    f"{type(self.model).__name__} gave no {kind} of {missing[0]}: that module ran no attention of its "
                    "own in this forward pass, or was left out. Use signals of logits and hidden states alone, or "
                    "implement qpipe_model_map"
                )
        if "hidden_states" in kinds:
            if getattr(output, "hidden_states", None) is None:
                raise ModelError(
                    f"{type(self.model).__name__} gives no hidden states of one stack of blocks; use signals of its "
                    "logits alone"
                )
            states = list(output.hidden_states)
            last = store.pop(("hidden_states", len(self.map.blocks)), None)
            if last is not None and len(states) == len(self.map.blocks) + 1:
                states[-1] = last
            store.update({("hidden_states", layer): hidden for layer, hidden in enumerate(states)})
