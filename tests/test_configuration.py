"""What a configuration file may not say, found while it is read."""

import pytest
from pydantic import ValidationError

from qpipe import LossWeight, Options
from qpipe.config import read_yaml, resolve
from qpipe.errors import ConfigError
from qpipe.validation import describe


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
        ({"data": {"text_columns": "*.q"}}, r"in place of '\*.q' write \['\*.q'\]"),  # else an alias of YAML
        ({"data": {"text_columns": "{x}"}}, r"write \['\{x\}'\]"),  # else a mapping
        ({"train": {"trackers": None}}, "train.trackers is empty; give it a list, or leave it out"),
        ({"plugins": {"kure": False}}, r"plugins.kure = False is no mapping.* leave kure out .* write kure: \{\}"),
        ({"plugins": {"kure": []}}, r"plugins.kure = \[\] is no mapping"),
        ({"model": {"name": "m", "keep_layers": [-1]}}, "model.keep_layers.0 = -1: Input should be greater than or"),
        (
            {"model": {"name": "m", "keep_layers": "odd"}},
            "model.keep_layers = 'odd': allowed: 'every-other', or a list",
        ),
        ({"data": {"labels": [1.5]}}, "data.labels.0 = 1.5: allowed: string, or integer"),
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


class Weighted(Options):
    """As options of plugins have them."""

    loss: LossWeight = 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "loss = -1: Input should be greater than or equal to 0"),
        ("x", "loss = 'x': allowed: number, or a section"),
        (
            {"schedule": "linear", "initial": 1, "final": 0, "start": 0.5, "stop": 0.2},
            "loss: start 0.5 must come before",
        ),
        (
            {"schedule": "linear", "initial": 1, "final": 0, "strt": 0.5},
            "loss.strt is not an option; did you mean 'start'",
        ),
        ({"schedule": "odd", "initial": 1, "final": 0}, "loss.schedule = 'odd': Input should be 'linear', 'cosine' or"),
        ({"schedule": "linear", "initial": "a", "final": 0}, "loss.initial = 'a': Input should be a valid number"),
    ],
)
def test_a_value_of_several_forms_is_told_what_is_wrong_with_the_one_that_was_meant(given, message):
    with pytest.raises(ValidationError) as caught:
        Weighted(loss=given)
    text = describe(caught.value, Weighted)
    assert text.startswith(message) and "constrained" not in text and ";" not in text.replace("; did", "")


def test_plugins_that_are_named_without_options():
    assert resolve({"model": {"name": "m"}, "plugins": {"kure": None}}).plugins == {"kure": {}}
    assert resolve({"model": {"name": "m"}, "plugins": {"kure": {}}}, ["plugins=null"]).plugins == {}


def test_files_that_are_no_text_in_utf8(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("task: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml cannot be read as text in UTF-8"):
        resolve(tmp_path / "latin.yaml")
    plan = {"model": {"name": "m"}, "quantization": {"plan": str(tmp_path / "plan.yaml")}}
    for rules in ("5", "{site: x}"):
        (tmp_path / "plan.yaml").write_text(f"quantization: {{rules: {rules}}}")
        with pytest.raises(ConfigError, match=r"plan.yaml: quantization.rules is a list of rules"):
            resolve(plan)


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
        ("data.text_columns.0.x=1", "data.text_columns.0 is a value, not a section"),
        ("data.keep_labels.0.x=1", "data.keep_labels.0 is a value, not a section"),
        ("plugins.kure=false", "plugins.kure = False is no mapping of options"),
    ],
)
def test_overrides(override, message):
    source = {"model": {"name": "m"}, "seed": 1, "quantization": {"rules": [{"site": "a"}]}}
    source |= {"data": {"text_columns": ["a"], "keep_labels": [None]}}
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        resolve(source, [override])


def test_a_list_is_no_configuration():
    with pytest.raises(ConfigError, match="mine.yaml must hold a mapping of sections"):
        read_yaml("- a", "mine.yaml")
