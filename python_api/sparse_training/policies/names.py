"""Policies by name."""

from __future__ import annotations

from typing import Any

from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.policies.adaptive import AdaptivePolicy
from sparse_training.policies.base import Policy, RandomPolicy, check_rate
from sparse_training.policies.by_loss import BatchImportancePolicy, BatchInfoBatchPolicy, TopKPolicy
from sparse_training.policies.gate import GatePolicy
from sparse_training.policies.history import HistoryPolicy, ImportancePolicy, InfoBatchPolicy
from sparse_training.policies.masked import MaskedPolicy
from sparse_training.ranks import own_seed, place
from sparse_training.scorers import make_scorer
from sparse_training.scoring import Scorer

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (
        Policy,
        RandomPolicy,
        AdaptivePolicy,
        GatePolicy,
        TopKPolicy,
        ImportancePolicy,
        InfoBatchPolicy,
        MaskedPolicy,
    )
}
# The same laws within a batch, where a scorer is named that scores batches.
BY_SCORES: dict[str, type[Policy]] = {kind.name: kind for kind in (BatchImportancePolicy, BatchInfoBatchPolicy)}


def make_policy(
    policy: str | Policy | Gate, *, rate: float, seed: int, loss: Any = None, scorer: str | Scorer | None = None
) -> Policy:
    """A policy from its name, from a gate, or as it is.

    A gate made here sees the loss the model is trained on: its ignore_index and label smoothing; of several
    processes of torch.distributed all share its threshold. Other policies made here draw by a seed of each process.

    Args:
        policy: a name in POLICIES, or policy@scorer, such as "gate@early:3", which is then its name; a Policy, or a
            Gate.
        scorer: as for ``make_scorer``; None for the policy's own.

    Raises:
        UserError: an unknown name, a rate outside (0, 1], a scorer for a policy that asks none or has its own, or two.
    """
    check_rate(rate)
    rank, ranks = place()
    said = policy
    if isinstance(policy, str) and "@" in policy:
        if scorer is not None:
            raise UserError(f"policy {policy!r} and scorer {scorer!r}: wanted one scorer")
        policy, _, scorer = policy.partition("@")
    scorer = None if scorer is None else make_scorer(scorer)
    if isinstance(policy, Policy):
        made = policy
    elif isinstance(policy, Gate):
        made = GatePolicy(seed=seed, gate=policy)
    elif policy not in POLICIES:
        raise UserError(f"policy {policy!r}: wanted one of {', '.join(POLICIES)}")
    elif policy == "gate":
        known = ("ignore_index", "label_smoothing")
        shared = {name: getattr(loss, name) for name in known if hasattr(loss, name)}
        made = GatePolicy(rate, seed, process_group="world" if ranks > 1 else None, **shared)
    else:
        kinds = POLICIES if scorer is None or scorer.before_loading else {**POLICIES, **BY_SCORES}
        made = kinds[policy](rate, own_seed(seed, rank))
    if scorer is not None and not (scorer.before_loading and isinstance(made, HistoryPolicy)):
        if made.scored_by is None or isinstance(made, MaskedPolicy):
            raise UserError(f"scorer {scorer.name} for the policy {made.name}, which asks none: wanted no scorer")
        made.scorer = scorer
    if isinstance(said, str):
        made.name = said
    return made
