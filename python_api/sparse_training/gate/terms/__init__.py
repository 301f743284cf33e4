"""Terms of significance beyond a weighted sum of the logits' statistics: one file each, on ``base`` and ``context``."""

from sparse_training.gate.terms.base import Term
from sparse_training.gate.terms.constant import Constant
from sparse_training.gate.terms.context import Context
from sparse_training.gate.terms.contrast import Contrast
from sparse_training.gate.terms.difficulty import Difficulty
from sparse_training.gate.terms.feedback import Feedback
from sparse_training.gate.terms.learning import LearningValue, LossChange
from sparse_training.gate.terms.novelty import Novelty
from sparse_training.gate.terms.uncertainty import Uncertainty

__all__ = [
    "Constant",
    "Context",
    "Contrast",
    "Difficulty",
    "Feedback",
    "LearningValue",
    "LossChange",
    "Novelty",
    "Term",
    "Uncertainty",
]
