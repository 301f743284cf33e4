"""Training on the rows that matter: the gate, the trainer and honest comparisons.

    trainer = SparseTrainer(model, policy="gate", rate=0.1)
    trainer.fit(loader, seconds=60, evaluate=test_loader)

or, inside a loop of one's own:

    gate = Gate(rate=0.1)
    kept = gate(logits, targets)
    inputs, targets = kept.take((inputs, targets))
"""

from sparse_kernels import __version__
from sparse_training import nn
from sparse_training.budget import Budget
from sparse_training.controller import PIController
from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.nn import Compact, Expand
from sparse_training.policies import POLICIES, Policy
from sparse_training.sampler import HistorySampler, Indexed
from sparse_training.schedules import Ramp
from sparse_training.significance import Significance
from sparse_training.trainer import SparseTrainer

__all__ = [
    "POLICIES",
    "Budget",
    "Compact",
    "Expand",
    "Gate",
    "HistorySampler",
    "Indexed",
    "PIController",
    "Policy",
    "Ramp",
    "Significance",
    "SparseTrainer",
    "UserError",
    "__version__",
    "nn",
]
