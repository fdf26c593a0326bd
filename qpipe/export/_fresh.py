"""Run as a script by `verify`, in a process of its own in which qpipe cannot be imported (imported, it hides nothing).

`python -P _fresh.py JOB RESULT` reads a JSON list of jobs and writes a JSON list of findings. It holds to what anyone
has who downloads a checkpoint: torch, transformers, compressed-tensors, safetensors and numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class _NoQpipe:
    """Import hook that hides qpipe, so that nothing in the checkpoint can lean on it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "qpipe" or name.startswith("qpipe."):
            raise ImportError("qpipe is hidden while an export is verified")


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoQpipe())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def digest(value: torch.Tensor) -> str:
    """SHA-256 of a tensor's contiguous bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def prepared(folder: str) -> Iterator[dict[str, torch.Tensor]]:
    """The prepared batches, which files in the folder hold as `<batch>.<input>`."""
    for file in sorted(Path(folder).iterdir()):
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in load_file(file).items():
            batch, _, key = name.partition(".")
            groups.setdefault(batch, {})[key] = value
        yield from (groups[batch] for batch in sorted(groups))


def predict(model: Any, batches: Iterable[dict[str, torch.Tensor]], kind: str) -> dict[str, torch.Tensor]:
    """Predictions and references of the batches."""
    predictions, references = [], []
    for inputs in batches:
        labels = inputs.pop("labels")
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        logits = model(**inputs).logits
        if kind == "causal-lm":
            targets = labels[:, 1:]
            shifted = logits[:, :-1].float().transpose(1, 2)
            losses = torch.nn.functional.cross_entropy(shifted, targets, ignore_index=-100, reduction="none")
            predictions.append(losses.double().sum(1))
            references.append((targets != -100).sum(1))
        elif kind == "masked-lm":
            masked = labels != -100
            chosen, targets = logits[masked].float(), labels[masked]
            losses = torch.nn.functional.cross_entropy(chosen, targets, reduction="none")
            values = torch.zeros(*labels.shape, 2, dtype=torch.float64)
            values[masked] = torch.stack([losses.double(), (chosen.argmax(-1) == targets).double()], -1)
            predictions.append(values.sum(1))
            references.append(masked.sum(1))
        elif kind == "intent-slot":
            # The configuration says which labels are intents: those are read at the first token, the others elsewhere.
            tags = sum(not name.startswith("intent:") for name in model.config.id2label.values())
            predicted = logits[..., :tags].argmax(-1)
            predicted[:, 0] = tags + logits[:, 0, tags:].argmax(-1)
            predictions.append(predicted.masked_fill(labels == -100, -100))
            references.append(labels)
        else:
            predictions.append(logits.float())
            references.append(labels)
    return {"predictions": join(predictions), "references": join(references)}


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Batches `[examples, ...]` as one tensor; labels of tokens are filled up with -100 to the longest batch."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    rows = [row for part in parts for row in part]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def auto_class(job: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The class to load with, the model's configuration, and keywords for both ways of loading."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto, trusted = getattr(transformers, job["auto_class"]), job["trust_remote_code"]
    config = transformers.AutoConfig.from_pretrained(job["directory"], trust_remote_code=trusted)
    own = (getattr(config, "auto_map", None) or {}).get(job["auto_class"]) if trusted else None
    made = get_class_from_dynamic_module(own, job["directory"]) if own else auto._model_mapping[type(config)]
    wanted = job["attention"]
    # Convolution nets have no attention to choose.
    supported = wanted and getattr(made, f"_supports_{wanted}", True)
    return auto, config, {"trust_remote_code": trusted, **({"attn_implementation": wanted} if supported else {})}


def outputs_of(model: Any, reference: str, batches: str | None, kind: str) -> dict[str, torch.Tensor]:
    """Logits of the reference inputs; predictions and references of the prepared batches, if there are any.

    Args:
        model: any that returns logits.
        reference: safetensors file with `inputs.<name>`.
        batches: folder of prepared batches, or None.
        kind: of the task.
    """
    inputs = {k.removeprefix("inputs."): v for k, v in load_file(reference).items() if k.startswith("inputs.")}
    with torch.inference_mode():
        logits = model(**inputs).logits  # compressed-tensors unpacks the weights before the first forward pass
        return {"logits": logits.contiguous(), **(predict(model, prepared(batches), kind) if batches else {})}


def run(model: Any, job: dict[str, Any]) -> None:
    """Write what the model computes."""
    reference = f"{job['directory']}/{job['reference']}"
    save_file(outputs_of(model, reference, job["batches"], job["kind"]), job["outputs"])


def stock(job: dict[str, Any]) -> dict[str, Any]:
    """Load with stock transformers, run the reference, hash every tensor, predict the prepared batches."""
    auto, _, extra = auto_class(job)
    model, info = auto.from_pretrained(job["directory"], output_loading_info=True, **extra)
    problems = [f"{key}: {sorted(map(str, info[key]))}" for key in ("missing_keys", "unexpected_keys") if info[key]]
    run(model.eval(), job)
    state = model.state_dict()
    hashes = {n: digest(state[n]) for n in job["names"] if n in state}
    return {"hashes": hashes, "problems": problems, "ranges": ranges_of(model)}


def ranges_of(model: Any) -> dict[str, dict[str, Any]]:
    """How compressed-tensors quantizes the activations of a loaded model, by `module:slot`."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        for slot in ("input", "output"):
            how = getattr(scheme, f"{slot}_activations", None)
            if how is not None:
                entry = {"bits": how.num_bits, "symmetric": how.symmetric, "dynamic": bool(how.dynamic)}
                found[f"{name}:{slot}"] = {**entry, "granularity": getattr(how.strategy, "value", how.strategy)}
            if how is not None and not how.dynamic:
                scale, zero = (getattr(module, f"{slot}_{part}", None) for part in ("scale", "zero_point"))
                zero = 0.0 if zero is None else float(zero)
                found[f"{name}:{slot}"] |= {"scale": None if scale is None else float(scale), "zero_point": zero}
    return found


def read_weight(directory: Path, name: str, layout: dict[str, Any], files: dict[str, str]) -> np.ndarray[Any, Any]:
    """One weight of a native checkpoint, float32: what the recipe of docs/format.md gives, in less memory."""
    w = layout["weights"][name]
    with safe_open(directory / files.get(name, "model.safetensors"), "numpy") as f:
        rows, b, n = f.get_tensor(name).reshape(w["shape"][0], -1), w["bits"], math.prod(w["shape"][1:])
    with safe_open(directory / files.get(name + "_scale", "model.safetensors"), "numpy") as f:
        s = f.get_tensor(name + "_scale")
    if w["packer"] == "trits":
        powers = np.array([1, 3, 9, 27, 81], np.uint8)
        q = (rows[..., None] // powers % 3).reshape(len(rows), -1)[:, :n].astype(np.float32) - 1
    else:
        q = np.full((len(rows), n), -(2.0 ** (b - 1)), np.float32)
        for row, packed in zip(q, rows, strict=True):  # one at a time: the bits alone take 8 bytes per weight
            bits = np.unpackbits(packed, count=n * b, bitorder="little").reshape(n, b)
            row += np.packbits(bits, axis=1, bitorder="little")[:, 0]
    z = np.zeros((1, 1))
    with safe_open(directory / files.get(name + "_zero_point", "model.safetensors"), "numpy") as f:
        if name + "_zero_point" in f.keys():
            z = f.get_tensor(name + "_zero_point")
    q = q.reshape(len(rows), s.shape[1], -1)
    return ((q - z[..., None]).astype(np.float32) * s[..., None]).reshape(w["shape"])


def native(job: dict[str, Any]) -> dict[str, Any]:
    """Decode a native checkpoint with numpy and hash every tensor; run it if no activation is quantized."""
    directory = Path(job["directory"])
    layout = json.loads((directory / "quantization.json").read_text())
    index = directory / "model.safetensors.index.json"
    files: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    dtype = getattr(torch, layout["dtype"])
    state = {}
    for name in job["names"]:
        if name in layout["weights"]:
            state[name] = torch.from_numpy(read_weight(directory, name, layout, files)).to(dtype)
        else:
            with safe_open(directory / files.get(name, "model.safetensors"), "pt") as f:
                state[name] = f.get_tensor(name)
    problems = run_decoded(state, dtype, job) if job["plain"] else []
    return {"hashes": {name: digest(value) for name, value in state.items()}, "problems": problems}


def run_decoded(state: dict[str, torch.Tensor], dtype: torch.dtype, job: dict[str, Any]) -> list[str]:
    """Run the plain model with decoded weights; what the weights lack, or have too much."""
    auto, config, extra = auto_class(job)
    model = auto.from_config(config, dtype=dtype, **extra)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    absent = sorted(set(missing) - set(getattr(model, "_tied_weights_keys", None) or {}))
    run(model.eval(), job)
    return [f"{key}: {names}" for key, names in (("missing", absent), ("unexpected", unexpected)) if names]


class Runnable:
    """A program as `predict` calls models: it returns logits, and knows its type and configuration."""

    def __init__(self, graph: Any, dtype: torch.dtype, config: Any) -> None:
        self.graph, self.dtype, self.config = graph, dtype, config

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """An object with `logits`."""
        return SimpleNamespace(logits=self.graph(**inputs))


def program(job: dict[str, Any]) -> dict[str, Any]:
    """Load a program with torch, hash its weights and other tensors by the recipe of docs/format.md, and run it."""
    directory = Path(job["directory"])
    layout = json.loads((directory / job["program_layout"]).read_text())
    dtype = getattr(torch, layout["dtype"])
    exported = torch.export.load(directory / job["program"])
    state = exported.state_dict
    hashes = {name: digest(state[name]) for name in layout["tensors"] if name in state}
    for name, entry in layout["weights"].items():
        codes, scale, zero = (state[entry[part]] for part in ("codes", "scale", "zero_point"))
        rows = codes.float()
        if entry["group_size"]:
            rows = rows.reshape(len(codes), -1, entry["group_size"])
        hashes[name] = digest(((rows - zero) * scale).to(dtype).view(entry["shape"]))
    run(Runnable(exported.module(), dtype, auto_class(job)[1]), job)
    return {"hashes": hashes, "problems": []}


LOADERS = {"native": native, "program": program}
"""By format; every other format is loaded by transformers."""


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Findings of one job; an error becomes a finding, so that the other jobs still run."""
    try:
        if job["num_threads"]:
            torch.set_num_threads(job["num_threads"])
        return LOADERS.get(job["format"], stock)(job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main(job_file: str, result_file: str) -> None:
    """Work through the jobs."""
    jobs = json.loads(Path(job_file).read_text())
    Path(result_file).write_text(json.dumps([work(job) for job in jobs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
