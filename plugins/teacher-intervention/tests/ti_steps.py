"""One step of the training loop, without engine or data: the plugin through the core's real instruments."""

from types import SimpleNamespace

import torch

from qpipe import Signals, Step
from qpipe.builtin.models import Models
from qpipe.builtin.modules import QuantModules
from qpipe.model.instrument import Instruments


def instruments(model):
    """Sites and captures of a model."""
    found = Instruments(model, Models().qpipe_model_map(model), lambda m: QuantModules().qpipe_quantize_module(m))
    found.enable_capture()
    return found


def make_run(folder, student, teacher, total_steps=12, kind="classification"):
    """What the plugin uses of a run."""
    return SimpleNamespace(
        student=student,
        teacher=teacher,
        instruments=instruments(student),
        teacher_instruments=instruments(teacher),
        total_steps=total_steps,
        phases=(),
        step=None,
        config=SimpleNamespace(seed=0),
        task=SimpleNamespace(kind=kind),
        engine=SimpleNamespace(rank=0),
        out=folder,
    )


def forward(model, found, wanted, store, batch):
    """Call a model and store its signals."""
    found.want(wanted, store)
    found.context.taps_active = True
    hidden = {"output_hidden_states": True} if "hidden_states" in wanted else {}
    output = model(**{name: value for name, value in batch.items() if name != "labels"}, **hidden)
    found.context.taps_active = False
    found.take_outputs(output, wanted, store)
    return output


def micro_step(plugin, run, index, batch, extra=frozenset(), said=None):
    """One step: (step, weighted loss parts by name). `extra` signals are captured too; the teacher's become `said`."""
    run.step = step = Step(index, True, dict(batch))
    plugin.qpipe_step_start(step)
    wanted = plugin.qpipe_signals(run) | Signals(extra, extra)
    with torch.no_grad():
        forward(run.teacher, run.teacher_instruments, wanted.teacher, step.teacher, batch)
    step.teacher.update({key: value for key, value in (said or {}).items() if key in step.teacher})
    step.output = forward(run.student, run.instruments, wanted.student, step.student, batch)
    return step, {loss.name: loss.weight * loss.fn(step) for loss in plugin.qpipe_losses(run)}
