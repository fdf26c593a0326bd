"""Attention that qpipe cannot compute is refused before anything long begins."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from qpipe.errors import ModelError, QpipeError
from qpipe.model.instrument import Instruments
from qpipe.run import Run
from qpipe.stages.calibrate import inputs_of
from qpipe.types import Signals

logger = logging.getLogger("qpipe.stages")


def require_attention(run: Run, wanted: Signals) -> None:
    """Let one example through each model that computes its attention by qpipe's function, where its weights are now.

    What a model asks of its attention function shows in a forward pass alone: no configuration says it for all models.

    Args:
        run: prepared to be thrown away; the engine has not wrapped the student.
        wanted: what plugins want captured.

    Raises:
        ModelError: the attention of a model has what qpipe's function does not compute, or not in the maps that
            something needs; or a module that was taken for attention computes none.
    """
    models = [(run.student, run.instruments, wanted.student)]
    if run.teacher is not None and run.teacher_instruments is not None:
        models.append((run.teacher, run.teacher_instruments, wanted.teacher))
    for model, instruments, kinds in models:
        instruments.want(kinds, {})
        if instruments.computes_attention:
            try_forward(model, instruments, inputs_of(run.data.collate([run.data.train[0]])))


def try_forward(model: nn.Module, instruments: Instruments, inputs: dict[str, Tensor]) -> None:
    """Call a model without gradients and quantization; only qpipe's own errors count.

    Others may come from kernels that work on the device of the training alone, and must not stop a run.
    """
    weight = next(model.parameters())
    placed = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    model.eval()
    instruments.context.enabled = False
    try:
        with torch.no_grad():
            model(**placed)
        silent = instruments.silent_attention()
        if silent is not None:
            raise ModelError(
                f"{silent} of {type(model).__name__} computes no attention itself, so that nothing can be put there or "
                "taken from it; leave out rules and plugins for sites within attention, or implement qpipe_model_map"
            )
    except QpipeError:
        raise
    except Exception as error:
        logger.warning(
            "whether qpipe can compute the attention of %s shows only in training: one example does not pass through "
            "the model on %s (%s: %s)",
            type(model).__name__,
            weight.device,
            type(error).__name__,
            error,
        )
    finally:
        instruments.context.enabled = True
