"""Tiny models of every family with data, for runs and for single steps."""

from itertools import islice

import torch
import transformers as hf

from qpipe import Step
from qpipe.config import resolve
from qpipe.host import load_plugins
from qpipe.stages.build import override_dropout
from qpipe.stages.calibrate import calibrate, to_device
from qpipe.stages.evaluate import evaluate
from qpipe.stages.execute import assemble
from qpipe.stages.phases import enter_phase
from qpipe.stages.train import collect_losses, micro_step, steps_from
from qpipe.testing import tiny_model, tiny_text_data
from qpipe.testing.gradients import write_traces
from qpipe.testing.tiny import VOCABULARY, tiny_images, tiny_lines

FAMILIES = ("bert", "roberta", "ernie", "distilbert", "vit", "llama", "qwen3")
DECODERS = ("llama", "qwen3")


def load(folder, family, seed, **sizes):
    """A model in training mode without dropout."""
    path = tiny_model(folder / f"{family}-{seed}", family, seed, initializer_range=0.2, **sizes)
    cls = hf.AutoModelForSequenceClassification
    cls = hf.AutoModelForImageClassification if family == "vit" else cls
    cls = hf.AutoModelForCausalLM if family in DECODERS else cls
    model = cls.from_pretrained(path)
    override_dropout(model, 0.0)
    return model.train()


def batch(family):
    """Two examples; of texts, the second is padded."""
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, len(VOCABULARY), (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return {"input_ids": ids * mask, "attention_mask": mask}


def run_config(folder, family, options, **train):
    """A short run with `ti-g` under Accelerate on one process; another model of the family is the teacher."""
    if family == "vit":
        task, data = "image-classification", {"train": str(tiny_images(folder / "vit.parquet"))}
    elif family in DECODERS:
        task, data = "causal-lm", {"train": str(tiny_lines(folder / f"{family}.jsonl")), "max_length": 16}
    else:
        task, data = "sst2", {"train": str(tiny_text_data(folder / f"{family}.jsonl", 60)), "max_length": 16}
        # The losses count padding, and processes pad their parts of a batch to different lengths.
        data["pad_to_max_length"] = True
    models = [tiny_model(folder / f"{family}-{seed}", family, seed, initializer_range=0.2) for seed in range(2)]
    per_row = {"bits": 4, "granularity": "channel"}
    return resolve(
        {
            "model": {"name": str(models[0])},
            "teacher": {"name": str(models[1]), "init_student": False},
            "task": task,
            "data": {**data, "validation_fraction": 0.2},
            "quantization": {"rules": [{"site": "{block}.*:weight", "options": per_row}]},
            "train": {"max_steps": 4, "batch_size": 8, "log_every": 1, "dropout": 0.0, "warmup": 0.0, **train},
            "engine": {"name": "accelerate", "precision": "float32", "cpu": True},
            "export": {"format": "native"},
            "plugins": {"ti-g": options},
            "out": str(folder / f"run-{family}"),
        }
    )


def traces_and_ages(traced, aged, evaluated, steps, folder):
    """Write traces of some cases; return `optimizer_ages` and `evaluations` of others. For `run_distributed`."""
    write_traces(traced, steps, folder)
    return optimizer_ages(aged, steps), evaluations(evaluated)


def evaluations(cases):
    """By case, the first metric with the teacher's attention as in the first step, and of the student alone."""
    found = {}
    for name, source in cases.items():
        config = resolve(source)
        run = assemble(config, load_plugins(config.plugins), {})
        calibrate(run)
        losses = collect_losses(run)
        run.student.train()
        index, (batch,) = next(steps_from(run, 0))
        enter_phase(run, index)
        step = Step(index, True, to_device(batch, run))
        micro_step(run, step, losses)
        metric = run.task.metrics[0].name
        found[name] = [evaluate(run, step)[metric], evaluate(run)[metric]]
        run.engine.close()
    return found


def optimizer_ages(cases, steps):
    """By case, how often the optimizer had stepped since it was fresh, after each step."""
    found = {}
    for name, source in cases.items():
        config = resolve(source)
        run = assemble(config, load_plugins(config.plugins), {})
        calibrate(run)
        losses, ages = collect_losses(run), []
        run.student.train()
        for index, (batch,) in islice(steps_from(run, 0), steps):
            enter_phase(run, index)
            micro_step(run, Step(index, True, to_device(batch, run)), losses)
            run.engine.step()
            run.instruments.context.weights_changed()
            ages.append(sorted({int(state["step"]) for state in run.scheduler.optimizer.state.values()}))
        run.engine.close()
        found[name] = ages
    return found
