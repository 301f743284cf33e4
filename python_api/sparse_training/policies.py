"""Policies: which rows of a batch are trained on.

A policy may choose before loading (``choose``: the rows left out cost nothing), after scoring
(``select``: rows are taken by what the model says of them), or not at all. What training makes of its
rows comes back (``observe``), so that it can choose by past losses. To add one, subclass ``Policy``,
override what differs, and enter it in POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_kernels import Selection
from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.history import Drawn, Importance, InfoBatch, ScoreTable
from sparse_training.loader import Batch, Choice, Offer

Scorer = Callable[[Any], Tensor]  # inputs -> logits, without gradient


class Kept(NamedTuple):
    """The rows to train on. The loss is their mean, or with ``weight`` sum(weight * loss) / divisor."""

    inputs: Any
    targets: Tensor
    rows: int | Tensor  # how many; a device tensor where padding hides the number from the host
    positions: Tensor | None = None  # int64 positions in the batch, None for all of it
    weight: Tensor | None = None  # float32, 0 on padding
    divisor: int | Tensor = 1


class Policy(nn.Module):
    """Every row; the base of the others. State belongs in buffers or in the extra state."""

    name = "dense"
    before_loading = False  # whether what it leaves out is never loaded
    phased = True  # whether a run's warm-up and anneal train on every row; if not, it chooses in them too

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):  # results and costs are filed under it: no two may share one
            cls.name = cls.__name__.lower()

    def __init__(self, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.rate = check_rate(rate)
        self.seed = seed

    @property
    def target(self) -> float | None:
        """The fraction of rows that it aims to keep; None where it aims at none."""
        return None

    def prepare(self, rows: int | None, targets: Tensor | None = None) -> None:
        """Told before a run what it is about.

        Args:
            rows: of the data set; None where none can be had by its number.
            targets: [rows, ...], of all of them, where the loader holds them.
        """

    def choose(self, offer: Offer) -> Choice | None:
        """The rows to load in place of those offered; None for just these."""
        return None

    def score(self, scorer: Scorer, batch: Batch) -> Tensor | None:
        """What ``select`` needs to know of the batch, None for nothing."""
        return None

    def select(self, scores: Tensor | None, batch: Batch) -> Kept:
        """The rows of a loaded batch to train on."""
        return Kept(batch.inputs, batch.targets, batch.rows, None, batch.weight, batch.rows)

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """What the model made of the rows just trained on, before it learned from them; where rows have numbers.

        Args:
            ids: int64 [n]; of the dense phases too.
            losses: [n].
            logits: what the model gave, [n, classes] for a classifier.
        """

    def at(self, progress: float) -> None:
        """Told before each gated step how far the run is, 0 to 1, for what follows a schedule."""

    def likely_rows(self, rows: int) -> range:
        """How many of a loaded batch's rows this policy may well keep, for the clock to time."""
        return range(rows, rows + 1)

    def trace(self) -> tuple[Tensor, Tensor] | None:
        """Smoothed rate and threshold, on the device, where there is a controller to watch."""
        return None

    def warnings(self, rate: float | None) -> list[str]:
        """What a reader of the run must know, given the rate it reached."""
        return []


class RandomPolicy(Policy):
    """round(rate * B) rows of each batch, drawn before loading by a generator of its own.

    Where that rounds to 0, one row with probability rate * B.
    """

    name = "random"
    before_loading = True

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def target(self) -> float:
        return self.rate

    def choose(self, offer: Offer) -> Choice:
        rows = len(offer.ids)
        return Choice(offer.ids[torch.randperm(rows, generator=self.generator)[: self.count(rows)]])

    def count(self, rows: int) -> int:
        """How many of so many rows to keep this time."""
        count = round(self.rate * rows)
        return count or int(torch.rand((), generator=self.generator).item() < self.rate * rows)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


class GatePolicy(Policy):
    """The rows whose significance is above the gate's threshold.

    With a gate temperature rows are drawn and weighted 1/p, and the gradient estimates the whole
    batch's without bias. Without one the loss is the mean over the kept rows: that is biased towards
    them, on purpose, and changes the gradient's scale with the rate.
    """

    name = "gate"

    @property
    def target(self) -> float:
        return self.rate

    def __init__(self, rate: float = 0.1, seed: int = 0, gate: Gate | None = None, **options: Any) -> None:
        super().__init__(gate.rate if gate is not None else rate, seed)
        self.gate = gate if gate is not None else Gate(rate, seed=seed, **options)

    def score(self, scorer: Scorer, batch: Batch) -> Tensor:
        return scorer(batch.inputs)

    def select(self, scores: Tensor | None, batch: Batch) -> Kept:
        if scores is None or scores.ndim != 2:
            shape = None if scores is None else list(scores.shape)
            raise UserError(f"scores of shape {shape}: the gate wanted logits [B, classes], one row a sample")
        selection: Selection = self.gate(scores, batch.targets, index=batch.ids)
        inputs, targets = selection.take((batch.inputs, batch.targets))
        padded = self.gate.capacity is not None
        count = selection.count if padded else selection.index.shape[0]
        if self.gate.temperature > 0.0:
            return Kept(inputs, targets, count, selection.index, selection.weight, batch.rows)
        if padded:
            divisor = selection.count.clamp(min=1)
            return Kept(inputs, targets, count, selection.index, selection.weight, divisor)
        return Kept(inputs, targets, count, selection.index)

    def at(self, progress: float) -> None:
        self.gate.at(progress)
        self.rate = self.gate.rate

    def likely_rows(self, rows: int) -> range:
        if self.gate.capacity is not None:
            return super().likely_rows(min(self.gate.capacity, rows))
        aim = max(1, round(self.rate * rows))
        return range(max(1, aim // 2), min(rows, 2 * aim) + 1)

    def trace(self) -> tuple[Tensor, Tensor]:
        return self.gate.rate_observed.detach().clone(), self.gate.threshold.detach().clone()

    def warnings(self, rate: float | None) -> list[str]:
        found = []
        steps, saturated = int(self.gate.step), int(self.gate.saturated)
        if saturated > 0.1 * steps:
            found.append(
                f"the gate's controller was saturated in {saturated} of {steps} steps: its rate is not the target's"
            )
        steered = self.gate.schedule is None and not self.gate.by_mass  # to one rate, all the time
        if steered and rate is not None and abs(rate - self.rate) > max(0.02, 0.2 * self.rate):
            found.append(f"the gate kept {rate:.1%} of the rows it was offered; the target was {self.rate:.1%}")
        if invalid := int(self.gate.invalid):
            found.append(f"{invalid} rows were not finite and left out")
        if overflow := int(self.gate.overflow):
            found.append(f"{overflow} selected rows were over the gate's capacity and left out")
        return found


class HistoryPolicy(Policy):
    """Chooses by each row's loss when it was last trained on: nothing is scored, nothing left out is loaded.

    The next choice hangs on the last losses, so on an accelerator it waits for the step before it.
    """

    before_loading = True
    table: ScoreTable | None = None
    _observed: tuple[Tensor, Tensor] | None = None  # not yet in the table

    def prepare(self, rows: int | None, targets: Tensor | None = None) -> None:
        if rows is None:
            raise UserError(
                f"the policy {self.name} asks for rows by their number: wanted data held in memory (ResidentLoader); "
                "for a DataLoader there is HistorySampler"
            )
        if self.table is None:
            self.table = ScoreTable(rows)
            self.set_law(self.table)
        elif self.table.rows != rows:
            raise UserError(f"the policy {self.name} has a table of {self.table.rows} rows: wanted one of {rows}")

    def set_law(self, table: ScoreTable) -> None:
        """Make what draws from the table."""
        raise NotImplementedError

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        self.up_to_date()
        self._observed = ids, losses

    def up_to_date(self) -> ScoreTable:
        """The table, with the last losses in it."""
        assert self.table is not None, "prepare was not called"
        if self._observed is not None:
            self.table.update(*self._observed)
            self._observed = None
        return self.table

    def warnings(self, rate: float | None) -> list[str]:
        table, found = self.up_to_date(), []
        if table.seen < table.rows:
            found.append(
                f"{table.rows - table.seen} of {table.rows} rows were never trained on: the run was too short for "
                "their past to matter"
            )
        if table.invalid:
            found.append(f"{table.invalid} losses were not finite and left out of the table")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self.up_to_date().state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed = None
        if state:
            self.prepare(len(state["table"]["scores"]))
            assert self.table is not None
            self.table.load_state_dict(state["table"])


class ImportancePolicy(HistoryPolicy):
    """As many rows as ``random`` keeps, drawn from the whole data set by their last losses, weighted 1/p.

    See ``history.Importance``; rows never trained on come first.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        self.uniform = uniform
        self.law: Importance | None = None

    @property
    def target(self) -> float:
        return self.rate

    def set_law(self, table: ScoreTable) -> None:
        self.law = Importance(table, seed=self.seed, uniform=self.uniform)

    def choose(self, offer: Offer) -> Choice:
        self.up_to_date()
        assert self.law is not None
        return Choice(*self.law.draw(max(1, round(self.rate * len(offer.ids)))))

    def get_extra_state(self) -> dict[str, Any]:
        state = super().get_extra_state()
        return {**state, "law": self.law.state_dict()} if self.law is not None else state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        if self.law is not None and state:
            self.law.load_state_dict(state["law"])


class InfoBatchPolicy(HistoryPolicy):
    """Every row but some of the well-learned ones; see ``history.InfoBatch``.

    As published, steps are as large as without it and fewer: rows that one batch has too few of wait for
    the next one, and in the meantime a step does nothing. The rate follows from the losses; ``rate`` is
    not used. The trainer's anneal, an eighth of the run by default, is the published delta = 0.875.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        self.prune = prune
        self.law: InfoBatch | None = None
        self.waiting = Drawn(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def set_law(self, table: ScoreTable) -> None:
        self.law = InfoBatch(table, seed=self.seed, prune=self.prune)

    def choose(self, offer: Offer) -> Choice:
        self.up_to_date()
        assert self.law is not None
        kept = self.law.prune(offer.ids, offer.epoch)
        index, weight = (torch.cat(parts) for parts in zip(self.waiting, kept, strict=True))
        size = len(offer.ids) if len(index) >= len(offer.ids) else 0
        self.waiting = Drawn(index[size:], weight[size:])
        return Choice(index[:size], weight[:size])

    def get_extra_state(self) -> dict[str, Any]:
        state = {**super().get_extra_state(), "waiting": tuple(self.waiting)}
        return {**state, "law": self.law.state_dict()} if self.law is not None else {}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        if self.law is not None and state:
            self.law.load_state_dict(state["law"])
            self.waiting = Drawn(*(part.cpu() for part in state["waiting"]))


POLICIES: dict[str, type[Policy]] = {
    kind.name: kind for kind in (Policy, RandomPolicy, GatePolicy, ImportancePolicy, InfoBatchPolicy)
}


def make_policy(policy: str | Policy | Gate, *, rate: float, seed: int, loss: Any = None) -> Policy:
    """A policy from its name, from a gate, or as it is.

    A gate made here sees the loss the model is trained on: its ignore_index and label smoothing.

    Raises:
        UserError: an unknown name, or a rate outside (0, 1].
    """
    check_rate(rate)
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Gate):
        return GatePolicy(seed=seed, gate=policy)
    if policy not in POLICIES:
        raise UserError(f"policy {policy!r}: wanted one of {', '.join(POLICIES)}")
    if policy != "gate":
        return POLICIES[policy](rate, seed)
    known = ("ignore_index", "label_smoothing")
    return GatePolicy(rate, seed, **{name: getattr(loss, name) for name in known if hasattr(loss, name)})


def check_rate(rate: float) -> float:
    """The rate, if it is in (0, 1]; otherwise a UserError."""
    if not 0.0 < rate <= 1.0:
        raise UserError(f"rate {rate}: wanted more than 0 and at most 1")
    return rate
