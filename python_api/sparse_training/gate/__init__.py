"""The gate: it keeps rows above a threshold, which a PI controller moves so that a target rate is met."""

from sparse_training.gate.budget import Budget
from sparse_training.gate.controller import PIController
from sparse_training.gate.gate import Gate, SetPoint
from sparse_training.gate.presets import preset
from sparse_training.gate.schedules import Follow, Ramp, Transition
from sparse_training.gate.significance import Significance
from sparse_training.gate.terms import Term

__all__ = [
    "Budget",
    "Follow",
    "Gate",
    "PIController",
    "Ramp",
    "SetPoint",
    "Significance",
    "Term",
    "Transition",
    "preset",
]
