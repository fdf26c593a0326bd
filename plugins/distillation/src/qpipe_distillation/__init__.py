"""Knowledge distillation: the student learns the teacher's logits, hidden states and attention."""

from qpipe_distillation.options import DistillationOptions
from qpipe_distillation.plugin import Distillation

__all__ = ["Distillation", "DistillationOptions"]
