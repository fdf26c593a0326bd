"""What a configuration file may not say, found while it is read."""

import pytest

from qpipe.config import read_yaml, resolve
from qpipe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 5}\ntask: sst2\ntrain: {batch_size: 8}", r"key 'train' is written twice.*line 1"),
        ("plugins:\n  kure: {}\n  kure: {weight: 2}", "key 'kure' is written twice"),
        ("on: 1", "key True is no text"),
        ("1: {}", "key 1 is no text"),
    ],
)
def test_keys(text, message):
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        read_yaml(text, "mine.yaml")


def test_a_merged_mapping_may_be_overridden():
    text = "a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}"
    assert read_yaml(text, "mine.yaml")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"plugins": ["kure", "ti-g"]}, r"plugins maps names to options; in place of \['kure', 'ti-g'\] write"),
        ({"plugins": "kure,ti-g"}, r"write \{kure: \{\}, ti-g: \{\}\}"),
        ({"data": {"labels": [False, True]}}, "YAML reads yes, no, .* as False; put labels in quotes"),
        ({"data": {"keep_labels": [1, True]}}, "as True; put labels in quotes"),
        ({"train": {"epochs": float("inf")}}, "train.epochs"),
        ({"teacher": {"learning_rate": float("inf")}}, "teacher.learning_rate"),
        ({"seed": -1}, "seed"),
        ({"data": {"labels": 5}}, r"data.labels is a list; in place of 5 write \[5\]"),
        ({"data": {"text_columns": "review"}}, r"data.text_columns is a list; in place of 'review' write \[review\]"),
        ({"model": "org/bert"}, r"model is a section; in place of 'org/bert' write \{name: org/bert\}"),
        ({"quantization": "w4a8"}, r"in place of 'w4a8' write \{preset: w4a8\}"),
        ({"data": None}, "data is empty; give it keys, or leave it out"),
        ({"model": {}}, "model.name is missing"),
        (
            {"train": {"epoch": 3}, "data": {"x": 1}},
            r"data.x is not an option; allowed: train,.*; train.epoch .*'epochs'",
        ),
        ({"quantization": {"ptq": {"exampels": 3}}}, "quantization.ptq.exampels .*; did you mean 'examples'"),
        (
            {"quantization": {"rules": [{"site": "{head}:weight", "bits": 8}]}},
            r"quantization.rules.0.bits is not an option; options of a quantizer go .* write options: \{bits: 8\}",
        ),
        (
            {"quantization": {"rules": [{"site": "a", "optons": {}}]}},
            "rules.0.optons is not an .*; did you mean 'options'",
        ),
    ],
)
def test_values(source, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"model": {"name": "m"}, **source})


def test_a_configuration_needs_a_model():
    with pytest.raises(ConfigError, match=r"model is missing; write model: \{name: ...\}"):
        resolve({"task": "sst2"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "seed.*KEY=VALUE"),
        ("seed.x=1", "seed is a value, not a section"),
        ("quantization.rules.3.site=a", "'3' is no index of a list of 1"),
        ("quantization.rules.x.site=a", "'x' is no index of a list"),
    ],
)
def test_overrides(override, message):
    source = {"model": {"name": "m"}, "seed": 1, "quantization": {"rules": [{"site": "a"}]}}
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        resolve(source, [override])


def test_a_list_is_no_configuration():
    with pytest.raises(ConfigError, match="mine.yaml must hold a mapping of sections"):
        read_yaml("- a", "mine.yaml")
