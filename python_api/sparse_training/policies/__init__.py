"""Policies: which rows of a batch are trained on.

A policy may choose before loading (``choose``: the rows left out cost nothing), by what a scorer says of
rows (``decide``: before loading where the scorer needs row numbers alone, after it otherwise), or not at
all. What training makes of its rows comes back (``observe``), so that it can choose by past losses. To
add one, subclass ``Policy`` and override what differs; an instance of it is what ``SparseTrainer`` takes.
To have it by name, enter it in POLICIES (names.py).
"""

from sparse_training.policies.adaptive import AdaptivePolicy
from sparse_training.policies.base import Decision, Kept, Policy, RandomPolicy, check_rate
from sparse_training.policies.by_loss import BatchImportancePolicy, BatchInfoBatchPolicy, DrawingPolicy, TopKPolicy
from sparse_training.policies.gate import GatePolicy
from sparse_training.policies.history import HistoryPolicy, ImportancePolicy, InfoBatchPolicy, PastPolicy
from sparse_training.policies.masked import MaskedPolicy
from sparse_training.policies.names import BY_SCORES, POLICIES, make_policy

__all__ = [
    "BY_SCORES",
    "POLICIES",
    "AdaptivePolicy",
    "BatchImportancePolicy",
    "BatchInfoBatchPolicy",
    "Decision",
    "DrawingPolicy",
    "GatePolicy",
    "HistoryPolicy",
    "ImportancePolicy",
    "InfoBatchPolicy",
    "Kept",
    "MaskedPolicy",
    "PastPolicy",
    "Policy",
    "RandomPolicy",
    "TopKPolicy",
    "check_rate",
    "make_policy",
]
