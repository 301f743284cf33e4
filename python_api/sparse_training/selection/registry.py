"""Policies and scorers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_training.criterion import loss_setting
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.models.build import ModelFactory
from sparse_training.ranks import rank_and_world_size, rank_seed
from sparse_training.selection.policies.adaptive import AdaptivePolicy
from sparse_training.selection.policies.base import Policy, check_rate
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.history import HistoryPolicy
from sparse_training.selection.policies.importance import BatchImportancePolicy, ImportancePolicy
from sparse_training.selection.policies.infobatch import BatchInfoBatchPolicy, InfoBatchPolicy
from sparse_training.selection.policies.masked import MaskedPolicy
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.selection.policies.topk import TopKPolicy
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
# The same methods within a batch, for a scorer that scores batches.
BY_SCORES: dict[str, type[Policy]] = {kind.name: kind for kind in (BatchImportancePolicy, BatchInfoBatchPolicy)}

SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (SelfScorer, EarlyScorer, ProxyScorer, ReferenceScorer, HistoryScorer)
}
FORMS = "self, self:SCALE, early:LAYER, proxy, proxy:MODEL, reference:FILE, history"

DEFAULT_POLICY = InfoBatchPolicy.name  # the one that is unbiased and assumes nothing
DEFAULT_RATE = 0.1
# Settings of policies beside rate, seed and scorer.
POLICY_OPTIONS = {
    "infobatch": ("prune",),
    "importance": ("uniform",),
    "gate": ("temperature", "p_min", "floor", "capacity", "decision", "ties", "significance"),
}


def uses_rate(policy: str | Policy | Gate) -> bool:
    """Tell whether a rate is of use to make a policy.

    Args:
        policy: as for ``make_policy``; one that is already made has its own.

    Returns:
        True for a name, with or without a scorer, whose policy keeps a fraction of the rows that is given.
    """
    kind = _kind(policy) if isinstance(policy, str) else None
    return kind is not None and kind.target is not Policy.target


def _kind(name: str) -> type[Policy] | None:
    """Find the class of a policy's name, with or without switches and a scorer; None for an unknown name."""
    whole = name.partition("@")[0]
    bare, plus, _ = whole.partition("+")
    if not plus and (colon := _gate_and_significance(whole)):
        return POLICIES[colon[0]]
    return POLICIES.get(bare) if not plus or bare == AdaptivePolicy.name else None


def _gate_and_significance(name: str) -> tuple[str, str] | None:
    """Split "gate:vision" into the policy and its significance; None for a name of another form."""
    bare, colon, significance = name.partition(":")
    return (bare, significance) if colon and bare == GatePolicy.name else None


def check_rate_is_used(policy: str | Policy | Gate, rate: float | None) -> None:
    """Refuse a rate that would change nothing.

    Args:
        policy: as for ``make_policy``.
        rate: the rate given for it; None for none.

    Raises:
        UserError: a rate out of range, or one given to a policy that does not use it.
    """
    if rate is None:
        return
    check_rate(rate)
    _check_kind(policy)
    if isinstance(policy, str) and _kind(policy) is not None and not uses_rate(policy):
        those = ", ".join(name for name in POLICIES if uses_rate(name))
        raise UserError(f"`rate` is used by the policies {those}, got {rate} with {policy}; give none")
    if not isinstance(policy, str) and rate != policy.rate:
        raise UserError(f"`rate` must be that of the policy, {policy.rate}, where one is given made, got {rate}")


def make_policy(
    policy: str | Policy | Gate,
    *,
    rate: float | None,
    seed: int,
    loss: Any = None,
    scorer: str | Scorer | None = None,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Make a policy from its name or from a gate.

    A gate made here uses the ``ignore_index`` and label smoothing of the loss, and the processes of torch.distributed
    share its threshold. Other policies made here draw by a seed of each process.

    Args:
        policy: a name in ``POLICIES``, where "adaptive" has its switches behind it, such as "adaptive+denoise+balance";
            or gate:significance, such as "gate:vision", see ``sparse_training.gate.preset``; or policy@scorer, such as
            "gate@early:3", which is then its name; a Gate; or a Policy, which is returned as
            it is.
        rate: fraction of the rows to keep, in (0, 1]; None for ``DEFAULT_RATE``.
        seed: seed of the policy's draws.
        loss: the loss that the model is trained on, or its ``Criterion``; None (the default) where it is unknown. Where
            its rows are tokens, "infobatch" and "importance" draw among those of a batch.
        scorer: a scorer or its name, see ``make_scorer``; None (the default) for the policy's own.
        options: further settings of a policy that is named, see ``POLICY_OPTIONS``; None (the default) for none.

    Returns:
        The policy, with its scorer.

    Raises:
        UserError: the name is unknown, the rate is out of range, two scorers are named, the policy uses none, or it
            has no such option.
    """
    _check_kind(policy)
    rate = DEFAULT_RATE if rate is None else check_rate(rate)
    rank, ranks = rank_and_world_size()
    given = policy
    if isinstance(policy, str) and "@" in policy:
        if scorer is not None:
            raise UserError(f"`policy` {policy!r} names a scorer, and `scorer` is {scorer!r}; give one scorer")
        policy, _, scorer = policy.partition("@")
    scorer = None if scorer is None else make_scorer(scorer)
    options = dict(options or {})
    if isinstance(policy, str) and (split := _gate_and_significance(policy)):
        policy, significance = split
        if "significance" in options:
            raise UserError(f"`policy` {given!r} names a significance, and `significance` is given too; give one")
        options["significance"] = significance
        if significance == "none":  # every row alike: which are kept is drawn
            options.setdefault("ties", "random")
    options = _check_options(policy, options)
    if isinstance(policy, Policy):
        made = policy
    elif isinstance(policy, Gate):
        made = GatePolicy(seed=seed, gate=policy)
    elif (kind := _kind(policy)) is None:
        raise UserError(f"`policy` must be one of {', '.join(POLICIES)}, got {policy!r}")
    elif issubclass(kind, AdaptivePolicy):
        made = kind.from_name(policy, seed=rank_seed(seed, rank))
    elif policy == "gate":
        known = ("ignore_index", "label_smoothing")
        settings = {} if loss is None else {name: loss_setting(loss, name) for name in known}
        shared = {name: value for name, value in settings.items() if value is not None}
        made = GatePolicy(rate, seed, process_group="world" if ranks > 1 else None, **shared, **options)
    else:
        in_batch = getattr(loss, "granularity", None) == "token" if scorer is None else not scorer.before_loading
        made = (BY_SCORES.get(policy, kind) if in_batch else kind)(rate, rank_seed(seed, rank), **options)
    if scorer is not None and not (scorer.before_loading and isinstance(made, HistoryPolicy)):
        if not made.uses_scores or isinstance(made, MaskedPolicy):
            raise UserError(f"scorer {scorer.name} for the policy {made.name}, which takes none; leave the scorer out")
        made.scorer = scorer
    if isinstance(given, str) and not isinstance(made, AdaptivePolicy):  # whose own name has its switches in order
        made.name = given
    return made


def _check_kind(policy: Any) -> None:
    """Refuse what is neither a name nor a policy or gate."""
    if not isinstance(policy, str | Policy | Gate):
        given = f"the class {policy.__name__}; make it" if isinstance(policy, type) else type(policy).__name__
        raise UserError(f"`policy` must be a name, a Policy or a Gate, got {given}")


def _check_options(policy: str | Policy | Gate, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Refuse options that a policy does not have."""
    known = POLICY_OPTIONS.get(policy, ()) if isinstance(policy, str) else ()
    if unknown := [name for name in options or () if name not in known]:
        name = policy if isinstance(policy, str) else type(policy).__name__
        raise UserError(f"the policy {name} has the options {', '.join(known) or 'none'}, got {unknown[0]!r}")
    return dict(options or {})


def make_scorer(scorer: str | Scorer) -> Scorer:
    """Make a scorer from its name.

    Args:
        scorer: a name, with an argument behind a colon where it takes one: "self", "self:0.5" (scale of the images to
            score), "early:LAYER", "proxy", "proxy:MODEL", "reference:FILE" or "history"; or a Scorer, which is
            returned as it is.

    Returns:
        The scorer.

    Raises:
        UserError: the name is unknown, or its argument is missing or wrong.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if not isinstance(scorer, str):
        raise UserError(f"`scorer` must be a name or a Scorer, got {type(scorer).__name__}")
    name, colon, argument = scorer.partition(":")
    if name not in SCORERS or bool(argument) != bool(colon):
        raise UserError(f"`scorer` must be one of {FORMS}, got {scorer!r}")
    if name == "self" and argument:
        try:
            return SelfScorer(resolution=float(argument))
        except ValueError:
            raise UserError(f"`scorer` self must have a scale in (0, 1), such as self:0.5, got {scorer!r}") from None
    if (name in ("early", "reference")) != bool(argument) and name != "proxy":
        raise UserError(f"`scorer` must be one of {FORMS}, got {scorer!r}")
    if name == "proxy":
        return ProxyScorer(ModelFactory(argument or "cnn-tiny"))
    return SCORERS[name](*[argument] if argument else [])
