"""The model card of an export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = """\
---
library_name: transformers
{% if licence %}
license: {{ licence }}
{% endif %}
{% if hub_base %}
base_model: {{ hub_base }}
{% endif %}
tags:
- qpipe
{% if tag %}
- {{ tag }}
{% endif %}
- {{ format }}
---

# {{ title }}

Quantized {{ origin }}{{ how }}with qpipe {{ version }}.
The packed weights are exactly those that were evaluated; `qpipe verify .` proves it.

## Result

{% if metrics %}
| metric | quantized | full precision |
|---|---|---|
{% for name, value in metrics.items() %}
| {{ name }} | {{ number(value) }} | {{ number(teacher.get(name)) }} |
{% endfor %}
{% else %}
No metrics were recorded.
{% endif %}

## Quantization

| count | weights of | bits | granularity | zero point | stored as |
|---|---|---|---|---|---|
{% for row in weights %}
| {{ row | join(" | ") }} |
{% endfor %}

{% if activations %}
| count | activations | bits | range | zero point |
|---|---|---|---|---|
{% for row in activations %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
All other parameters are {{ dtype }}. Plan, plugin versions and hashes are in `qpipe.json`.
{% if plugins %}

Plugins: {{ plugins }}.
{% endif %}

## Use

{% if format == "compressed-tensors" %}
```sh
pip install torch transformers "compressed-tensors>=0.18"
```

```python
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("."{{ trust }})
```

Versions of compressed-tensors before 0.18 read widths other than 1, 2, 4 and 8 bits wrongly, without an error.
transformers unpacks the weights at the first forward pass; saving the model after that writes full-precision weights.
{% else %}
```python
from qpipe.export.native import load_native

model = load_native("."{{ trust }})
```

The layout is described by `quantization.json` and qpipe's `docs/format.md`; numpy is enough to read it.
{% endif %}
{% if program %}

The same network in other operations, for targets that need them, runs with torch alone:

```python
import torch

program = torch.export.load("{{ program }}").module()
logits = program({{ inputs }})
```

`program.json` lists its int8 weights and its quantized activations. A program is code: run those of people you trust.
{% endif %}

## Licence

{{ licence_text }}
"""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _weights(data: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    def row(w: Mapping[str, Any]) -> tuple[Any, ...]:
        granularity = f"group of {w['group_size']}" if w["group_size"] else w["granularity"]
        stored = w["stored"] if w["stored_bits"] == w["bits"] else f"{w['stored']}, {w['stored_bits']} bits"
        return w["module_type"], w["bits"], granularity, w["zero_point"], stored

    counts = Counter(row(w) for w in data["weights"].values())
    return [(count, *key) for key, count in counts.items()]


def _activations(data: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    def row(a: Mapping[str, Any]) -> tuple[Any, ...]:
        kind = "dynamic" if a["dynamic"] else "static"
        return a["slot"], a["bits"], f"{kind}, per {a['granularity']}", _zero_points(a)

    counts = Counter(row(a) for a in data["activations"])
    return [(count, *key) for key, count in counts.items()]


def _zero_points(activation: Mapping[str, Any]) -> str:
    """The kind of zero points of an activation as it is recorded: `none`, `integer` or `float`."""
    if activation["symmetric"]:
        return "none"
    if activation["dynamic"]:  # found from each batch: rounded, except where the outermost levels are the ends
        return "float" if activation.get("narrow") else "integer"
    given = activation.get("zero_point") or 0.0
    values = given if isinstance(given, Sequence) else [given]
    return "integer" if all(float(value).is_integer() for value in values) else "float"


def _making(data: Mapping[str, Any]) -> tuple[str, str]:
    """How the sentence about the export goes on, and the tag that says the same; empty where nobody recorded it."""
    if data.get("steps") is None:
        return "", ""
    if data["steps"] == 0:
        return "without training, ", "post-training-quantization"
    return "by quantization-aware training ", "quantization-aware-training"


def _plugins(data: Mapping[str, Any]) -> str:
    plugins = data.get("plugins") or {}
    versions = {n: (v if isinstance(v, str) else str(v.get("version", ""))) for n, v in plugins.items()}
    return ", ".join(f"`{name}` {about}".rstrip() for name, about in versions.items())


def _licence(name: str, has_file: bool) -> str:
    if name:
        return f"{name}, see `LICENSE`." if has_file else f"{name}."
    return "See `LICENSE`." if has_file else "The licence of the base model applies; none was recorded."


def render(data: Mapping[str, Any], has_licence_file: bool, inputs: Sequence[str] = ()) -> str:
    """The card as Markdown.

    Args:
        data: contents of `qpipe.json`.
        has_licence_file: True if a LICENSE file lies beside it.
        inputs: what the model is called with.
    """
    base = str(data.get("base_model") or "")
    is_hub = (
        base.count("/") <= 1 and not base.startswith((".", "/", "~")) and ":" not in base and not Path(base).exists()
    )
    package = base.removeprefix("package:").partition("/")[0] if base.startswith("package:") else ""
    shown = base if is_hub else package or base.rstrip("/").rpartition("/")[2]
    title = " ".join(filter(None, [shown.rpartition("/")[2], str(data.get("task") or ""), "quantized"]))
    how, tag = _making(data)
    environment = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=title,
        origin=(f"from `{shown}` " if shown else "") + (f"for task `{data['task']}` " if data.get("task") else ""),
        how=how,
        tag=tag,
        hub_base=base if is_hub else "",
        version=data["qpipe"],
        format=data["format"],
        metrics=data.get("metrics") or {},
        teacher=data.get("teacher_metrics") or {},
        weights=_weights(data),
        activations=_activations(data),
        dtype=data["dtype"],
        plugins=_plugins(data),
        auto_class=data["auto_class"],
        program=data.get("program"),
        inputs=", ".join(f"{name}={name}" for name in inputs),
        trust=", trust_remote_code=True" if data.get("custom_code") else "",
        licence=data.get("licence") or "",
        licence_text=_licence(str(data.get("licence") or ""), has_licence_file),
        number=_number,
    )
