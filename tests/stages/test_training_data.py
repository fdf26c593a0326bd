"""The hook that changes the training data, and the training's length."""

from dataclasses import replace

import pytest

import qpipe
from qpipe import ConfigError, Plugin, hookimpl
from qpipe.testing import tiny_config

pytestmark = pytest.mark.usefixtures("fast")


class Half(Plugin):
    """Trains on every other example, for three steps."""

    needs_teacher = True

    def __init__(self):
        super().__init__()
        self.seen = []

    @hookimpl
    def qpipe_training_data(self, data, engine):
        self.seen.append((len(data.train), engine.rank))
        rows = data.text.split.data.select(range(0, len(data.train), 2))
        return replace(data, train=data.text.encode(rows, data.text.labels[::2]), steps=3)


def test_rows_and_steps_are_the_plugins_and_the_teacher_keeps_the_original(tmp_path, use):
    half = Half()
    use(half)
    config = tiny_config(tmp_path, train__max_steps=None, train__epochs=2.0, train__batch_size=32, teacher__epochs=1.0)
    run = qpipe.execute(config)
    assert half.seen == [(128, 0)]
    assert len(run.data.train) == 64 and run.total_steps == run.results["steps"] == 3
    rows = run.data.text.split.data
    assert run.data.train["labels"] == [rows["label"][i] for i in range(0, 128, 2)]
    words = run.data.tokenizer(rows["sentence"][2])["input_ids"]
    assert run.data.train["input_ids"][1] == words
    logged = (tmp_path / "run" / "teacher" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 4' in logged[-1], "the teacher takes one epoch of all 128 examples in batches of 32"


def test_max_steps_of_the_configuration_comes_first(tmp_path, use, monkeypatch):
    monkeypatch.setattr(Half, "needs_teacher", False)
    use(Half())
    assert qpipe.execute(tiny_config(tmp_path, train__max_steps=2)).total_steps == 2


def test_what_is_wrong_elsewhere_shows_before_the_plugin_begins(tmp_path, use, monkeypatch):
    monkeypatch.setattr(Half, "needs_teacher", False)
    half = Half()
    use(half)
    with pytest.raises(ConfigError, match="format .nonsense. is unknown"):
        qpipe.execute(tiny_config(tmp_path, export__format="nonsense"))
    assert half.seen == []
