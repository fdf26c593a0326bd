"""Teacher intervention: the teacher's attention stands in for the student's while quantization settles."""

from qpipe_teacher_intervention.options import InterventionOptions
from qpipe_teacher_intervention.plugin import (
    GradualIntervention,
    MapIntervention,
    OutputIntervention,
    TeacherIntervention,
)
from qpipe_teacher_intervention.schedule import Phase, Schedule, make_schedule

__all__ = [
    "GradualIntervention",
    "InterventionOptions",
    "MapIntervention",
    "OutputIntervention",
    "Phase",
    "Schedule",
    "TeacherIntervention",
    "make_schedule",
]
