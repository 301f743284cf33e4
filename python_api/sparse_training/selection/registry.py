"""Policies and scorers by name."""

from __future__ import annotations

from typing import Any

from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.models.build import ModelFactory
from sparse_training.ranks import rank_and_world_size, rank_seed
from sparse_training.selection.policies.adaptive import AdaptivePolicy
from sparse_training.selection.policies.base import Policy, check_rate
from sparse_training.selection.policies.by_loss import BatchImportancePolicy, BatchInfoBatchPolicy, TopKPolicy
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.masked import MaskedPolicy
from sparse_training.selection.policies.past import HistoryPolicy, ImportancePolicy, InfoBatchPolicy
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.early import EarlyScorer
from sparse_training.selection.scorers.history import HistoryScorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.scorers.proxy import ProxyScorer
from sparse_training.selection.scorers.reference import ReferenceScorer

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


DEFAULT_RATE = 0.1


def uses_rate(policy: str | Policy | Gate) -> bool:
    """Tell whether a policy of this name is made with a rate; one that is already made has its own."""
    kind = POLICIES.get(policy.partition("@")[0]) if isinstance(policy, str) else None
    return kind is not None and kind.target is not Policy.target


def check_rate_is_used(policy: str | Policy | Gate, rate: float | None) -> None:
    """Refuse a rate that would change nothing.

    Raises:
        UserError: a rate out of range, or one given to a policy that does not use it.
    """
    if rate is None:
        return
    check_rate(rate)
    if isinstance(policy, str) and policy.partition("@")[0] in POLICIES and not uses_rate(policy):
        those = ", ".join(name for name in POLICIES if uses_rate(name))
        raise UserError(f"`rate` is used by the policies {those}, got {rate} with {policy}; give none")
    if not isinstance(policy, str) and rate != policy.rate:
        raise UserError(f"`rate` must be that of the policy, {policy.rate}, where one is given made, got {rate}")


def make_policy(
    policy: str | Policy | Gate, *, rate: float | None, seed: int, loss: Any = None, scorer: str | Scorer | None = None
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
    rate = DEFAULT_RATE if rate is None else check_rate(rate)
    rank, ranks = rank_and_world_size()
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
        made = kinds[policy](rate, rank_seed(seed, rank))
    if scorer is not None and not (scorer.before_loading and isinstance(made, HistoryPolicy)):
        if not made.uses_scores or isinstance(made, MaskedPolicy):
            raise UserError(f"scorer {scorer.name} for the policy {made.name}, which asks none: wanted no scorer")
        made.scorer = scorer
    if isinstance(said, str):
        made.name = said
    return made


SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (SelfScorer, EarlyScorer, ProxyScorer, ReferenceScorer, HistoryScorer)
}
FORMS = "self, self:SCALE, early:LAYER, proxy, proxy:MODEL, reference:FILE, history"


def make_scorer(scorer: str | Scorer) -> Scorer:
    """A scorer from its name, or as it is. What follows a colon is the scale of the images that the model itself
    scores, the layer, the proxy's name, or the file of the reference.

    Raises:
        UserError: an unknown name, or an argument that is missing or wrong.
    """
    if isinstance(scorer, Scorer):
        return scorer
    name, colon, argument = scorer.partition(":")
    if name not in SCORERS or bool(argument) != bool(colon):
        raise UserError(f"scorer {scorer!r}: wanted one of {FORMS}")
    if name == "self" and argument:
        try:
            return SelfScorer(resolution=float(argument))
        except ValueError:
            raise UserError(f"scorer {scorer!r}: wanted a scale, such as self:0.5") from None
    if (name in ("early", "reference")) != bool(argument) and name != "proxy":
        raise UserError(f"scorer {scorer!r}: wanted one of {FORMS}")
    if name == "proxy":
        return ProxyScorer(ModelFactory(argument or "cnn-tiny"))
    return SCORERS[name](*[argument] if argument else [])
