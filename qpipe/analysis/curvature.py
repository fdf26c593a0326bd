"""Curvature of a run's loss: Hessian eigenvalues of validation batches, and the loss on a plane through the weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qpipe.analysis.hessian import hessian_product, norms, top_eigenvalues
from qpipe.analysis.landscape import moved, offsets, random_direction
from qpipe.analysis.request import Request
from qpipe.analysis.session import Session
from qpipe.analysis.slopes import in_float32, twice_differentiable
from qpipe.errors import ModelError
from qpipe.run import Run, Step
from qpipe.stages.calibrate import inputs_of, to_device
from qpipe.stages.sensitivity import mean_loss, sample
from qpipe.stages.train import task_loss
from qpipe.types import Json


def trained_parameters(run: Run) -> dict[str, Tensor]:
    """The model's own parameters by name, without those of quantizers, which stay where they are."""
    others = {id(p) for quantizer in run.instruments.quantizers().values() for p in quantizer.parameters()}
    return {name: p for name, p in run.student.named_parameters() if id(p) not in others and p.requires_grad}


def validation_batches(run: Run, examples: int) -> list[dict[str, Tensor]]:
    """The first validation examples in batches of evaluation."""
    rows: Any = run.data.validation
    count, size = min(examples, len(rows)), run.config.train.eval_batch_size
    parts = (range(start, min(start + size, count)) for start in range(0, count, size))
    return [to_device(run.data.collate([rows[index] for index in part]), run) for part in parts]


def hessian(session: Session) -> dict[str, Json]:
    """Eigenvalues of largest magnitude of every validation batch.

    The loss is that of the task, of the quantized model in evaluation mode, without terms of plugins (Kim et al., EACL
    2023, figure 5). The authors' code adds 0.01 times the sum of all parameters' norms, which `norm_weight` does: it
    gives each a curvature of `norm_weight / norm`, so that a bias next to 0 can have the largest eigenvalue.

    Returns:
        `batch_size`, and for each of `batches` a list of `value`, `iterations` and `residual`.
    """
    run, ledger = session.run, session.ledger("hessian")
    with twice_differentiable(run):
        batches = validation_batches(run, session.request.few)
        for number, batch in enumerate(session.track(batches, "hessian, batches")):
            if str(number) not in ledger:
                ledger.put(str(number), _eigenvalues(run, batch, session.request, number))
    result = {"batch_size": len(batches[0]["labels"]), "batches": [ledger[str(n)] for n in range(len(batches))]}
    ledger.close()
    return result


def _eigenvalues(run: Run, batch: dict[str, Tensor], request: Request, number: int) -> list[dict[str, Json]]:
    parameters = list(trained_parameters(run).values())
    generator = torch.Generator().manual_seed(run.config.seed + number)
    try:
        output = run.student(**inputs_of(batch))
        loss = task_loss(run).fn(Step(0, False, batch, output))
        if request.norm_weight:
            loss = loss + request.norm_weight * norms(parameters)
        product = hessian_product(loss, parameters)
        found = top_eigenvalues(product, parameters, request.eigenvalues, generator)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("differentiate twice", "is not implemented", "not differentiable")):
            raise
        raise ModelError(
            f"the loss of {type(run.student).__name__} cannot be differentiated twice: {error}. Leave the part "
            "`hessian` out"
        ) from error
    return [asdict(eigenvalue) for eigenvalue in found]


def landscape(session: Session) -> dict[str, Json]:
    """The task's loss on a grid around the trained weights, on a fixed sample of training examples.

    Weights move in full precision and the quantizers act on what they become; scales of activations, buffers and the
    quantizers' own parameters stay. Norms and biases stay too, and with `filters: columns` what embeds positions.

    Returns:
        `offsets` along either direction, in lengths of the weights' own rows or columns, and `losses`, a row for each
        offset along the first; None where a loss is not finite.
    """
    run, request, ledger = session.run, session.request, session.ledger("landscape")
    generator = torch.Generator().manual_seed(run.config.seed)
    places = offsets(request.points)
    with in_float32(run):
        parameters = trained_parameters(run)
        directions = [random_direction(parameters, request.filters, generator) for _ in range(2)]
        batches, loss = sample(run, request.few), task_loss(run)
        for place in session.track([(a, b) for a in places for b in places], "landscape, points"):
            name = f"{place[0]:g},{place[1]:g}"
            if name not in ledger:
                with moved(parameters, directions, place):
                    run.instruments.context.weights_changed()
                    ledger.put(name, _finite(mean_loss(run, batches, loss)))
        run.instruments.context.weights_changed()
    result = {"offsets": places, "losses": [[ledger[f"{a:g},{b:g}"] for b in places] for a in places]}
    ledger.close()
    return result


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
