"""`quantization.plan`: a file of rules that becomes part of the configuration."""

import pytest
import yaml

from qpipe import ConfigError
from qpipe.config import dump, resolve

RULE = {"site": "a:weight", "quantizer": "uniform", "options": {"bits": 3}}
OWN = {"site": "*:weight", "quantizer": "uniform", "options": {"bits": 4}}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"quantization": {"rules": [RULE]}}))
    return path


def test_its_rules_come_after_those_of_the_configuration(plan, tmp_path):
    base = {"model": {"name": "m"}, "quantization": {"rules": [OWN], "plan": str(plan)}}
    config = resolve(base)
    assert [rule.model_dump() for rule in config.quantization.rules] == [OWN, RULE]
    assert config.quantization.plan is None, "what is resolved stands alone"
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config))
    plan.unlink()
    assert resolve(saved) == config


def test_it_can_be_set_on_the_command_line(plan):
    rules = resolve({"model": {"name": "m"}}, [f"quantization.plan={plan}"]).quantization.rules
    assert [rule.model_dump() for rule in rules] == [RULE]


@pytest.mark.parametrize(
    "text", ["rules: []", "quantization: {preset: w4}", "quantization: {rules: []}\nseed: 1", "quantization: [1]"]
)
def test_nothing_but_rules(plan, text):
    plan.write_text(text)
    with pytest.raises(ConfigError, match=r"plan.yaml must hold `quantization: \{rules: \[...\]\}` and nothing else"):
        resolve({"model": {"name": "m"}}, [f"quantization.plan={plan}"])


def test_a_wrong_rule_in_it_is_named(plan):
    plan.write_text("quantization: {rules: [{sight: x}]}")
    with pytest.raises(ConfigError, match="rules.0.s"):
        resolve({"model": {"name": "m"}}, [f"quantization.plan={plan}"])


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no.yaml' does not exist; `qpipe inspect sensitivity --out` writes one"):
        resolve({"model": {"name": "m"}}, [f"quantization.plan={tmp_path / 'no.yaml'}"])
