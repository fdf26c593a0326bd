"""Engine settings that contradict each other are refused with the configuration, before any process starts."""

import pytest

from qpipe.config import resolve
from qpipe.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.name=accelerate", "engine.zero=3"], "set engine.name: deepspeed"),
        (["engine.name=accelerate", "engine.offload=optimizer"], "belong to DeepSpeed"),
        (["engine.name=accelerate", "engine.config_file=x.json"], "belong to DeepSpeed"),
        (["engine.fsdp=true"], "belongs to engine.name: accelerate"),
        (["engine.zero=0", "engine.offload=optimizer"], "needs engine.zero 1, 2 or 3"),
        (["engine.zero=2", "engine.offload=all"], "needs engine.zero: 3"),
        (["engine.zero=4"], "engine.zero = 4"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        resolve(None, settings)


def test_what_fits():
    assert resolve(None, ["engine.zero=3", "engine.offload=all"]).engine.offload == "all"
    assert resolve(None, ["engine.name=accelerate"]).engine.name == "accelerate"
    assert resolve(None, ["engine.name=accelerate", "engine.fsdp=true"]).engine.fsdp
