"""A model whose attention qpipe cannot compute, or not in maps, is refused before anything long begins."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
)

import qpipe
from qpipe import Loss, ModelError, Plugin, Signals, TapStage, hookimpl
from qpipe.builtin.models import Models
from qpipe.builtin.modules import QuantModules
from qpipe.data.loading import find_task, load_data
from qpipe.engine import connect
from qpipe.host import load_plugins
from qpipe.model.instrument import OUTPUTS, Instruments
from qpipe.stages.attention import try_forward
from qpipe.stages.execute import rehearse
from qpipe.stages.prepare import refuse_layerdrop
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.tiny import VOCABULARY

BIAS = r"self \(BertSelfAttention\) uses 'position_bias' in its attention, which explicit attention maps do not support"


class Look(Plugin):
    """Takes signals of both models, and looks at one slot from step 3 on; counts examples of forward passes.

    The student's attention gets a position bias of 0, as some models have one.
    """

    needs_teacher = True

    def __init__(self, *kinds, slot=None, broken=False):
        super().__init__()
        self.kinds, self.slot, self.broken, self.seen, self.step = frozenset(kinds), slot, broken, [], -1

    @hookimpl
    def qpipe_model_prepared(self, run):
        def watch(module, args, kwargs):
            self.seen.append(len(kwargs["input_ids"]))
            if self.broken:
                raise NotImplementedError("no kernel for this device")

        run.student.register_forward_pre_hook(watch, with_kwargs=True)
        for path in run.instruments.map.attention:
            if self.slot is not None:
                run.instruments.add_tap(f"{path}:{self.slot}", TapStage.OBSERVE, lambda x: x, lambda: self.step >= 3)
            if self.kinds - OUTPUTS or run.instruments.computes_attention:
                run.instruments.attention(path).register_forward_pre_hook(
                    lambda module, args, kwargs: (args, kwargs | {"position_bias": torch.zeros(1)}), with_kwargs=True
                )

    @hookimpl
    def qpipe_step_start(self, step):
        self.step = step.index

    @hookimpl
    def qpipe_signals(self):
        return Signals(teacher=self.kinds, student=self.kinds)

    @hookimpl
    def qpipe_losses(self):
        return [Loss("none", lambda step: 0.0 * step.output.logits.sum())]


@pytest.fixture
def gemma2(tmp_path):
    """A run of a model that caps its attention scores."""
    folder = tiny_model(tmp_path / "gemma2")  # its tokenizer stays
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = Gemma2Config(vocab_size=len(VOCABULARY), num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    assert config.attn_logit_softcapping
    Gemma2ForSequenceClassification(config).save_pretrained(folder)
    changes = {"quantization__preset": None, "quantization__rules": [{"site": "{block}.*:weight"}]}
    return tiny_config(tmp_path, model__name=str(folder), export__format="native", **changes)


def instrumented(model):
    return Instruments(model, Models().qpipe_model_map(model=model), lambda m: QuantModules().qpipe_quantize_module(m))


def rehearsed(config):
    """The rehearsal alone."""
    task = find_task(load_plugins({}).collect("qpipe_tasks"), config.task)
    rehearse(config, connect(config.engine), load_data(config, task))


@pytest.mark.parametrize(("kinds", "slot"), [(("scores",), None), (("logits",), "probs")])
def test_maps_are_refused_before_a_teacher_is_fine_tuned(kinds, slot, tmp_path, use):
    use(Look(*kinds, slot=slot))
    with pytest.raises(ModelError, match=BIAS):
        qpipe.execute(tiny_config(tmp_path))
    assert not (tmp_path / "run" / "teacher").exists()


def test_maps_of_a_later_step_are_refused_before_the_first(tmp_path, use, monkeypatch):
    monkeypatch.setattr(Look, "needs_teacher", False)
    use(late := Look(slot="scores"))
    with pytest.raises(ModelError, match=BIAS):
        qpipe.execute(tiny_config(tmp_path))
    assert late.step == -1


def test_quantized_maps_are_refused_too(tmp_path, use):
    use(Look())
    rule = {"site": "{block}.*self:probs", "quantizer": "uniform-activation"}
    with pytest.raises(ModelError, match=BIAS):
        rehearsed(tiny_config(tmp_path, quantization__rules=[rule], export__format="native"))


def test_without_need_of_maps_it_is_tried_with_one_example(tmp_path, use):
    use(look := Look("logits", "context", slot="query"))
    rehearsed(tiny_config(tmp_path))
    assert look.seen == [1]


def test_signals_that_need_no_attention_leave_it_as_it_is(gemma2, use):
    """Any model can learn from a teacher's logits and hidden states."""
    use(look := Look("logits", "hidden_states"))
    rehearsed(gemma2)
    assert look.seen == []


def test_what_no_attention_of_qpipe_computes_is_refused(gemma2, tmp_path, use):
    use(Look("logits", "context"))
    with pytest.raises(ModelError, match=r"\(Gemma2Attention\) uses 'softcap' .*attention function does not compute"):
        qpipe.execute(gemma2)
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_model_that_keeps_its_own_attention_is_not_tried(gemma2, use, monkeypatch):
    monkeypatch.setattr(Look, "needs_teacher", False)
    use(look := Look())
    rehearsed(gemma2)
    assert look.seen == []


def test_attention_that_other_modules_compute_is_refused():
    """transformers records Swin's stages as its attentions, which their blocks compute."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
    model = SwinForImageClassification(SwinConfig(**sizes, window_size=4))
    found = instrumented(model)
    found.enable_capture()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    with pytest.raises(ModelError, match=r"swin.encoder.layers.0 of Swin.* computes no attention itself"):
        try_forward(model, found, inputs)
    found.want(frozenset({"scores"}), store := {})
    found.context.taps_active = True
    output = model(**inputs)
    with pytest.raises(ModelError, match=r"gave no scores of swin.encoder.layers.0"):
        found.take_outputs(output, frozenset({"scores"}), store)


def test_signals_of_layers_that_may_be_left_out_are_refused():
    model = SimpleNamespace(config=SimpleNamespace(layerdrop=0.1))
    refuse_layerdrop(model, {"logits"})
    with pytest.raises(ModelError, match=r"\(layerdrop 0.1\), .* its scores; set model.config: {layerdrop: 0}"):
        refuse_layerdrop(model, {"logits", "scores"})
    model.config.layerdrop = 0.0
    refuse_layerdrop(model, {"scores"})


def test_signals_that_were_not_announced_are_refused(tmp_path):
    model = BertForSequenceClassification.from_pretrained(tiny_model(tmp_path / "model"))
    found = instrumented(model)
    found.want(frozenset({"logits"}), {})
    with pytest.raises(ModelError, match=r"scores of Bert.* were not announced: before any step"):
        found.want(frozenset({"scores"}), {})


def test_a_model_that_cannot_be_tried_is_not_refused(tmp_path, use, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qpipe"), "propagate", True)
    use(look := Look("context", broken=True))
    rehearsed(tiny_config(tmp_path))
    assert look.seen == [1]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "BertForSequenceClassification" in record.message and "no kernel for this device" in record.message
