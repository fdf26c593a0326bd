"""Sections and keys of a configuration, with what each allows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qpipe.errors import ConfigError, suggest


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """Which model to load."""

    name: str = Field(description="hub name, folder, or `package:NAME/PATH` inside an installed package")
    revision: str | None = Field(None, description="hub revision")
    tokenizer: str | None = Field(None, description="where the tokenizer (or image processor) is; default: `name`")
    config: dict[str, Any] = Field(default_factory=dict, description="overrides of the model's own configuration")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="what training starts from; random: the architecture's own initialisation, drawn from `seed`, for "
        "pre-training; of `name` only the configuration and the tokenizer are read then",
    )
    keep_layers: Literal["every-other"] | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="the student keeps these blocks of the model, numbered from 0, in this order; every-other: the "
        "second, the fourth and so on; null: all",
    )
    trust_remote_code: bool = False


class TeacherConfig(Section):
    """The full-precision teacher. Without `name`, the run fine-tunes `model` first and uses the result.

    That training has the settings of `train`, but for its length and learning rate.
    """

    name: str | None = Field(None, description="a fine-tuned model; same forms as `model.name`")
    epochs: float = Field(2.0, gt=0, allow_inf_nan=False, description="length of the fine-tuning, where there is one")
    learning_rate: float = Field(5e-5, gt=0, allow_inf_nan=False)
    init_student: bool = Field(True, description="start the student from the teacher's weights")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type in which the teacher computes and is kept; auto: the run's compute type"
    )
    placement: Literal["auto", "whole", "sharded", "cpu"] = Field(
        "auto",
        description="where its weights are: whole on every process, sharded over all, or sharded in CPU memory; "
        "auto: as the student's (engine.zero: 3, engine.fsdp, engine.offload: all)",
    )
    cache: str | None = Field(
        None, description="folder that keeps what plugins capture of the teacher, for later epochs and runs; null: none"
    )


class DataConfig(Section):
    """Where the data are. Without `train`, the task's own hub data set is used."""

    train: str | None = Field(
        None, description="parquet, CSV, TSV, JSON, JSON lines or text file, `package:NAME/PATH`, or hub data set name"
    )
    validation: str | None = Field(
        None,
        description="same forms; default: the validation split of the hub data set or folder that `train` names, else "
        "a part of `train`, the same for every `seed`",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="part of `train` held out where none is named")
    text_columns: tuple[str, ...] | None = Field(None, description="one or two columns; default: the task's")
    label_column: str | None = None
    tag_column: str | None = Field(None, description="column with a tag for each word; default: the task's")
    labels: tuple[str | int, ...] | None = Field(
        None, description="label values in the order of their ids; rows with other values are an error"
    )
    keep_labels: tuple[str | int, ...] | None = Field(None, description="drop rows with other label values first")
    max_length: int = Field(128, gt=1, description="tokens per example; longer ones are truncated")
    pad_to_max_length: bool = False
    mask_probability: float = Field(0.15, gt=0, lt=1, description="part of the tokens that masked-lm predicts")
    max_train_examples: int | None = Field(
        None, gt=0, description="use a sample of this size, the same for every `seed`"
    )
    max_eval_examples: int | None = Field(None, gt=0)

    @field_validator("labels", "keep_labels", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        found = next(
            (label for label in (value if isinstance(value, list | tuple) else ()) if isinstance(label, bool)), None
        )
        if found is not None:
            raise ValueError(f"YAML reads yes, no, on, off, true and false as {found}; put labels in quotes")
        return value


class RuleConfig(Section):
    """Quantize the sites that match a pattern."""

    site: str = Field(description="pattern over `module.path:slot`; `{block}`, `{embedding}`, `{head}` expand")
    quantizer: str = Field("uniform", description="name of a quantizer, or `none`")
    options: dict[str, Any] = Field(default_factory=dict)


class PtqConfig(Section):
    """Weights that are quantized before any training: their grid is chosen once, with or without data."""

    range: Literal["min-max", "mse", "mse-golden", "percentile", "lp", "aciq-normal", "aciq-laplace", "likelihood"] = (
        Field("mse", description="of `uniform` weights, which become `uniform-static`; see there")
    )
    percentile: float | None = Field(None, description="for range `percentile`")
    p: float | None = Field(None, description="for range `lp`")
    weights: Literal["none", "lapq", "adaround"] = Field(
        "none", description="`lapq`: clips of least task loss; `adaround`: learn for each weight whether to round up"
    )
    bias_correction: bool = Field(
        False, description="correct biases by what quantization changes in the mean output of each layer"
    )
    examples: int = Field(256, gt=0, description="training examples that these methods see")
    batch_size: int = Field(32, gt=0, description="examples per batch of theirs")
    evaluations: int = Field(300, gt=0, description="lapq: how often the task loss may be measured in the joint search")
    iterations: int = Field(1000, gt=0, description="adaround: steps per layer")
    learning_rate: float = Field(1e-2, gt=0, description="adaround: of Adam")
    relaxation: Literal["hard-sigmoid", "sigmoid"] = Field("hard-sigmoid", description="adaround: form of the offsets")
    decay: Literal["cosine", "linear", "power", "sigmoid", "exp", "log"] = Field(
        "cosine", description="adaround: how the exponent of the rounding term falls from 20 to 2"
    )
    decay_shape: float = Field(1.0, gt=0, description="adaround: steepness of that, but for `cosine` and `linear`")

    @model_validator(mode="after")
    def _belongs_to_its_range(self) -> PtqConfig:
        for name, method in (("percentile", "percentile"), ("p", "lp")):
            if getattr(self, name) is not None and self.range != method:
                raise ValueError(f"give {name} with range: {method}, and only there")
        return self


class QuantizationConfig(Section):
    """What is quantized, and how."""

    preset: str | None = Field(
        None, description="a named list of rules that comes before `rules`; docs/plugins-and-quantizers.md lists them"
    )
    rules: tuple[RuleConfig, ...] = ()
    plan: str | None = Field(
        None, description="file with more `quantization.rules`, which are put after `rules` when the file is read"
    )
    scale_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="scales are rounded to this type while training; auto: the type the model is exported in, which "
        "has to hold all its numbers unless export.format is native",
    )
    noise: float = Field(
        1.0,
        ge=0,
        le=1,
        description="part of each weight's elements, drawn anew in every forward pass, that training quantizes; "
        "the others are not rounded (QuantNoise). Evaluation and export quantize all",
    )
    calibration_batches: int = Field(8, gt=0, description="batches of training data for activation ranges")
    calibration_batch_size: int | None = Field(
        None, gt=0, description="examples in each of them; null: a micro-batch of one process"
    )
    calibration_padding: bool = Field(
        False, description="padding tokens count in activation ranges, as in public code; false: they are left out"
    )
    ptq: PtqConfig | None = Field(
        None, description="quantize weights before training; `qpipe quantize` always does; null: do not"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="quantize in compiled code (CPUs), on the same levels bit for bit; auto: in long runs"
    )

    @field_validator("calibration_batches", mode="before")
    @classmethod
    def _some_batches(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError(
                "ranges that calibration sets need data: give 1 or more, not 0 (dynamic ones need none, and "
                "ask for none)"
            )
        return value


class TrainConfig(Section):
    """The loop."""

    epochs: float = Field(3.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, gt=0, description="optimizer steps; overrides `epochs`")
    batch_size: int = Field(32, gt=0, description="examples per optimizer step over all processes")
    accumulation: int = Field(1, gt=0, description="micro-batches per optimizer step")
    eval_batch_size: int = Field(64, gt=0, description="examples per evaluation batch and process")
    learning_rate: float = Field(5e-5, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="part of all steps")
    optimizer: Literal["adamw", "bert-adam"] = Field(
        "adamw", description="bert-adam: no bias correction, and by default each tensor's gradient clipped by itself"
    )
    schedule: Literal["linear", "cosine", "constant", "bert-linear"] = Field(
        "linear", description="bert-linear: that of BertAdam, linear with a warm-up that is not rounded to whole steps"
    )
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    clip_by: Literal["auto", "model", "tensor"] = Field(
        "auto",
        description="whose norm `clip` limits: that of all gradients together, or each tensor's own; "
        "auto: tensor with bert-adam, else model",
    )
    eval_every: int | None = Field(None, gt=0, description="optimizer steps between evaluations; default: an epoch")
    save_every: int | None = Field(None, gt=0, description="optimizer steps between checkpoints; default: an epoch")
    log_every: int = Field(10, gt=0)
    trackers: tuple[str, ...] = Field(
        (),
        description="experiment trackers of Accelerate that get what is logged: `tensorboard`, `wandb`, `mlflow`, ...",
    )
    keep_checkpoints: int = Field(2, gt=0)
    keep_best: bool = Field(True, description="end with the weights of the best evaluation instead of the last")
    activation_checkpointing: bool = False
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides every dropout of the model")

    @field_validator("trackers")
    @classmethod
    def _trackers_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
            for name in names:
                if name not in known:
                    allowed = ", ".join(sorted(known))
                    raise ValueError(f"{name!r} is no tracker{suggest(name, known)}; it is one of {allowed}")
        return names

    @property
    def clips_tensors(self) -> bool:
        """Whether gradients are clipped tensor by tensor."""
        by_tensor = self.clip_by == "tensor" or (self.clip_by == "auto" and self.optimizer == "bert-adam")
        return by_tensor and self.clip > 0

    def micro_batch_size(self, processes: int) -> int:
        """Examples per process and micro-batch.

        Raises:
            ConfigError: processes times accumulation does not divide the batch size.
        """
        parts = processes * self.accumulation
        if self.batch_size % parts:
            raise ConfigError(
                f"train.batch_size {self.batch_size} is not divisible by {processes} processes x "
                f"{self.accumulation} micro-batches; choose a multiple of {parts}"
            )
        return self.batch_size // parts


class EngineConfig(Section):
    """How processes work together."""

    name: Literal["deepspeed", "accelerate"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage (deepspeed)")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="what to keep in CPU memory (deepspeed)")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 where the hardware is faster in it (GPUs, AMX, AMD's AVX512-BF16), else float32",
    )
    config_file: str | None = Field(None, description="DeepSpeed JSON whose keys are added to those qpipe sets")
    fsdp: bool = Field(False, description="shard with FSDP2 instead of DDP (accelerate)")
    cpu: bool = Field(False, description="use CPUs even if there are GPUs")

    @model_validator(mode="after")
    def _fits_together(self) -> EngineConfig:
        if self.fsdp and self.name != "accelerate":
            raise ValueError("engine.fsdp belongs to engine.name: accelerate; DeepSpeed shards with engine.zero: 3")
        if self.name == "accelerate" and (self.zero > 1 or self.offload != "none" or self.config_file):
            raise ValueError(
                "engine.zero above 1, engine.offload and engine.config_file belong to DeepSpeed; "
                "set engine.name: deepspeed"
            )
        if self.offload != "none" and self.zero == 0:
            raise ValueError("engine.offload needs engine.zero 1, 2 or 3")
        if self.offload == "all" and self.zero != 3:
            raise ValueError("engine.offload: all keeps weights in CPU memory and needs engine.zero: 3")
        return self


class ExportConfig(Section):
    """The packed checkpoint."""

    format: str = Field("compressed-tensors", description="name of an exporter")
    reference_examples: int = Field(16, gt=0, description="validation examples whose logits `verify` compares")


class RunConfig(Section):
    """A whole run. `qpipe inspect plan` prints it resolved; docs/config.md lists every key."""

    model: ModelConfig
    teacher: TeacherConfig = TeacherConfig()
    task: str = Field("classification", description="name of a task")
    data: DataConfig = DataConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    export: ExportConfig = ExportConfig()
    plugins: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options by plugin name, in order")
    seed: int = Field(0, ge=0)
    out: str = Field("runs/default", description="the run directory")

    @model_validator(mode="after")
    def _can_shard_the_teacher(self) -> RunConfig:
        sharded = self.teacher.placement in ("sharded", "cpu")
        if sharded and self.engine.name == "accelerate" and not self.engine.fsdp:
            raise ValueError(
                f"teacher.placement: {self.teacher.placement} needs DeepSpeed, or engine.fsdp: true with Accelerate; "
                "set one of them, or teacher.placement: whole"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_one_model(self) -> RunConfig:
        if self.model.weights == "random" and self.teacher.name is not None and self.teacher.init_student:
            raise ValueError(
                f"model.weights: random, but the student would start from the weights of teacher.name "
                f"{self.teacher.name!r}; set teacher.init_student: false, or leave model.weights out"
            )
        return self


INDIFFERENT = (
    "export.",
    "teacher.cache",
    "teacher.placement",
    "train.eval_batch_size",
    "train.keep_checkpoints",
    "train.log_every",
    "train.save_every",
    "train.trackers",
)
"""Keys that decide neither the weights of a run nor which of them are the best: they may change when it goes on."""
