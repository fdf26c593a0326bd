"""How processes work together: DeepSpeed or Accelerate, behind one protocol."""

from __future__ import annotations

from qpipe.config import EngineConfig
from qpipe.engine.base import Engine


def connect(config: EngineConfig) -> Engine:
    """Join the other processes and return the engine named in the configuration.

    Raises:
        ConfigError: the engine's options contradict each other.
    """
    if config.name == "deepspeed":
        from qpipe.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from qpipe.engine.accelerate import AccelerateEngine

    return AccelerateEngine(config)
