"""The configuration of a run: YAML in, validated models out. Unknown keys are refused everywhere."""

from qpipe.config.resolving import default_recipe, dump, resolve
from qpipe.config.sections import (
    INDIFFERENT,
    DataConfig,
    EngineConfig,
    ExportConfig,
    ModelConfig,
    PtqConfig,
    QuantizationConfig,
    RuleConfig,
    RunConfig,
    Section,
    TeacherConfig,
    TrainConfig,
)
from qpipe.config.yaml_text import read_yaml, read_yaml_file, yaml_text

__all__ = [
    "INDIFFERENT",
    "DataConfig",
    "EngineConfig",
    "ExportConfig",
    "ModelConfig",
    "PtqConfig",
    "QuantizationConfig",
    "RuleConfig",
    "RunConfig",
    "Section",
    "TeacherConfig",
    "TrainConfig",
    "default_recipe",
    "dump",
    "read_yaml",
    "read_yaml_file",
    "resolve",
    "yaml_text",
]
