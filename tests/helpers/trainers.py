"""A trainer from one set of keywords, for tests that vary them."""

from dataclasses import fields

from sparse_training import SparseTrainer, TrainerSettings
from sparse_training.selection.policies.base import check_rate
from sparse_training.selection.registry import DEFAULT_POLICY, POLICIES, uses_rate

# Names that a policy can be made from.
NAMES = [f"{name}+denoise+deduplicate+balance" if name == "adaptive" else name for name in POLICIES]
SETTINGS = {field.name for field in fields(TrainerSettings)}


def make_trainer(model, **options):
    """``SparseTrainer(model, ...)`` with the step's settings among the keywords, without a rate that is not used."""
    settings = {name: options.pop(name) for name in list(options) if name in SETTINGS}
    policy = options.get("policy") or DEFAULT_POLICY
    if not isinstance(policy, str) or (policy.partition("@")[0] in NAMES and not uses_rate(policy)):
        check_rate(options.pop("rate", 1.0))
    return SparseTrainer(model, settings=TrainerSettings(**settings), **options)
