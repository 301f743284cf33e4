"""Policies: which rows of a batch are trained on.

A policy may choose before loading (``choose``: the rows left out cost nothing), by what a scorer says of
rows (``decide``: before loading where the scorer needs row numbers alone, after it otherwise), or not at
all. What training makes of its rows comes back (``observe``), so that it can choose by past losses. To
add one, subclass ``Policy`` and override what differs; an instance of it is what ``SparseTrainer`` takes.
To have it by name, enter it in POLICIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_kernels import Selection
from sparse_training.criterion import Criterion, are_classes
from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.history import Drawn, Importance, InfoBatch, ScoreTable
from sparse_training.loader import Batch, Choice, Offer
from sparse_training.original import PackageLaw
from sparse_training.ranks import own_seed, place
from sparse_training.scorers import make_scorer
from sparse_training.scoring import Scorer, Scores, forward
from sparse_training.worth import NOISE, Worth


class Kept(NamedTuple):
    """The rows to train on. The loss is their mean, or with ``weight`` sum(weight * loss) / divisor."""

    inputs: Any
    targets: Tensor
    rows: int | Tensor  # how many; a device tensor where padding hides the number from the host
    positions: Tensor | None = None  # int64 positions in the batch, None for all of it
    weight: Tensor | None = None  # float32, 0 on padding
    divisor: int | Tensor = 1


class Decision(NamedTuple):
    """Which of the rows that were scored to train on."""

    index: Tensor  # type: ignore[assignment]  # int64 [n], places among them
    weight: Tensor | None = None  # float32 [n], 1/p of a row drawn with probability p; None: their mean is what counts


class Policy(nn.Module):
    """Every row; the base of the others. State belongs in buffers or in the extra state.

    Attributes:
        scored_by: the name of the scorer it asks by default; None where it never asks (``decide`` is not called).
        scorer: the one it asks.
    """

    name = "dense"
    scored_by: str | None = None
    masks = False  # whether the rows left out are masked out of the loss, and cost as much as the others
    phased = True  # whether a run's warm-up and anneal train on every row; if not, it chooses in them too

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):  # results and costs are filed under it: no two may share one
            cls.name = cls.__name__.lower()

    def __init__(self, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.rate = check_rate(rate)
        self.seed = seed
        self.scorer: Scorer = make_scorer(self.scored_by or "self")

    @property
    def before_loading(self) -> bool:
        """Whether what it leaves out is never loaded."""
        return self.scored_by is not None and self.scorer.before_loading

    @property
    def target(self) -> float | None:
        """The fraction of rows that it aims to keep; None where it aims at none."""
        return None

    def prepare(
        self, rows: int | None, targets: Tensor | None = None, copies: Callable[[], Tensor | None] | None = None
    ) -> None:
        """Told before a run what it is about.

        Args:
            rows: of the data set; None where none can be had by its number.
            targets: [rows, ...], of all of them, where the loader holds them.
            copies: asks the loader for int64 [rows], how many rows have the same inputs; ``Loader.copies``.
        """
        self.scorer.prepare(rows)

    def decide(self, scores: Scores) -> Decision:
        """The rows to train on, by what the scorer says of them."""
        raise NotImplementedError

    def choose(self, offer: Offer) -> Choice | None:
        """The rows to load in place of those offered; None for just these."""
        if not self.before_loading:
            return None
        index, weight = self.decide(self.scorer.recall(offer.ids))
        if weight is not None:  # the loss is divided by the rows loaded, and estimates the mean of those offered
            weight = weight * (len(index) / len(offer.ids))
        return Choice(offer.ids[index], weight)

    def score(self, batch: Batch) -> Scores | None:
        """What ``select`` needs to know of the batch, None for nothing."""
        if self.scored_by is None or self.before_loading:
            return None
        found: Scores = self.scorer(batch)
        return found

    def select(self, scores: Scores | None, batch: Batch) -> Kept:
        """The rows of a loaded batch to train on."""
        if scores is None:
            rows = batch.rows if batch.counted is None else batch.counted
            return Kept(batch.inputs, batch.targets, rows, None, batch.weight, batch.divisor)
        index, weight = self.decide(scores)
        parts = (batch.inputs, batch.targets)
        inputs, targets = pytree.tree_map_only(Tensor, lambda tensor: tensor.index_select(0, index), parts)
        return Kept(inputs, targets, len(index), index, weight, batch.divisor)

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """What the model made of the rows just trained on, before it learned from them; where rows have numbers.

        Args:
            ids: int64 [n]; of the dense phases too.
            losses: [n].
            logits: what the model gave, [n, classes] for a classifier.
        """
        self.scorer.observe(ids, losses)

    def at(self, progress: float) -> None:
        """Told before each gated step how far the run is, 0 to 1, for what follows a schedule."""

    def aim(self, rate: float) -> None:
        """Another rate from the next step on."""
        self.rate = check_rate(rate)

    def likely_rows(self, rows: int) -> range:
        """How many of a loaded batch's rows this policy may well train on, for the clock to time."""
        all_of_them = self.target is None or self.before_loading or self.masks
        count = rows if all_of_them else max(1, round((self.target or 1.0) * rows))
        return range(count, count + 1)

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

    @property
    def before_loading(self) -> bool:
        return True

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
    scored_by = "self"
    aimed = False  # at other rates than the one it was made with

    @property
    def target(self) -> float:
        return self.rate

    def __init__(self, rate: float = 0.1, seed: int = 0, gate: Gate | None = None, **options: Any) -> None:
        super().__init__(gate.rate if gate is not None else rate, seed)
        self.gate = gate if gate is not None else Gate(rate, seed=seed, **options)

    def decide(self, scores: Scores) -> Decision:
        selection = self.gated(scores)
        if self.gate.capacity is None:
            return Decision(selection.index, selection.weight if self.gate.temperature > 0.0 else None)
        count = int(selection.count)  # waits for an accelerator; ``select`` does not
        return Decision(selection.index[:count], selection.weight[:count] if self.gate.temperature > 0.0 else None)

    def select(self, scores: Scores | None, batch: Batch) -> Kept:
        if scores is None:
            return super().select(scores, batch)
        if self.gate.capacity is None and batch.targets.device.type == "xla":  # a program for each number of rows kept
            steady = self.gate.schedule is None and not self.gate.by_mass
            self.gate.capacity = min(batch.rows, math.ceil(2 * self.rate * batch.rows)) if steady else batch.rows
        selection = self.gated(scores)
        inputs, targets = selection.take((batch.inputs, batch.targets))
        padded = self.gate.capacity is not None
        count = selection.count if padded else selection.index.shape[0]
        if self.gate.temperature > 0.0:
            return Kept(inputs, targets, count, selection.index, selection.weight, batch.divisor)
        if padded:
            divisor = selection.count.clamp(min=1)
            return Kept(inputs, targets, count, selection.index, selection.weight, divisor)
        return Kept(inputs, targets, count, selection.index)

    def gated(self, scores: Scores) -> Selection:
        """The gate's selection by logits of classes; where there are none, by the losses themselves.

        Of targets of several classes a sample, as of tokens or pixels, the mean significance is the sample's. An
        offset is one of the loss: it counts as much as the loss does in the significance.
        """
        logits, targets, offset = scores.logits, scores.targets, scores.offset
        if isinstance(logits, Tensor) and targets is not None and are_classes(logits, targets):
            if offset is not None:
                if "loss" not in self.gate.significance.weights:
                    raise UserError(f"the scorer {self.scorer.name} changes the loss: wanted a significance with it")
                offset = offset * self.gate.significance.loss
            if targets.ndim == 1:
                selection: Selection = self.gate(logits, targets, offset=offset)
                return selection
            if isinstance(scores.criterion, Criterion) and not self.gate.by_mass:
                significance = scores.criterion.significance(logits, targets, self.gate.significance.weights)
                return self.gate.by(significance if offset is None else significance + offset)
        return self.gate.by(scores.losses)

    def at(self, progress: float) -> None:
        self.gate.at(progress)
        self.rate = self.gate.rate

    def aim(self, rate: float) -> None:
        if self.gate.by_mass:
            raise UserError(f"a rate of {rate:g} for a gate with a mass: wanted a gate with a rate")
        self.gate.aim(rate)
        self.rate, self.aimed = rate, True

    def likely_rows(self, rows: int) -> range:
        if self.before_loading:  # these are the rows that it chose this time
            return range(min(rows, max(1, rows // 2)), rows + 1)
        if self.gate.capacity is not None:
            slots = min(self.gate.capacity, rows)
            return range(slots, slots + 1)
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
        steered = self.gate.schedule is None and not self.gate.by_mass and not self.aimed  # to one rate, all the time
        if steered and rate is not None and abs(rate - self.rate) > max(0.02, 0.2 * self.rate):
            found.append(f"the gate kept {rate:.1%} of the rows it was offered; the target was {self.rate:.1%}")
        if invalid := int(self.gate.invalid):
            found.append(f"{invalid} rows were not finite and left out")
        if overflow := int(self.gate.overflow):
            found.append(f"{overflow} selected rows were over the gate's capacity and left out")
        return found


class TopKPolicy(Policy):
    """The rows of the largest losses, round(rate * B) of each batch and at least one.

    Biased towards them, on purpose: what is noise or cannot be learned stays on top.
    """

    name = "topk"
    scored_by = "self"

    @property
    def target(self) -> float:
        return self.rate

    def decide(self, scores: Scores) -> Decision:
        losses = scores.losses
        count = min(len(losses), max(1, round(self.rate * len(losses))))
        # A loss that is not a number ranks below all others.
        return Decision(losses.nan_to_num(-torch.inf).topk(count, sorted=False).indices.sort().values)


class DrawingPolicy(Policy):
    """The base of policies that keep each row of a batch with a probability of its own and weigh it 1/p."""

    scored_by = "self"

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def probability(self, losses: Tensor) -> Tensor:
        """float32 [B], above 0 and at most 1; of finite losses [B]."""
        raise NotImplementedError

    def decide(self, scores: Scores) -> Decision:
        losses = scores.losses
        finite = losses.isfinite()
        p = torch.where(finite, self.probability(torch.where(finite, losses, 0.0)), 0.0)
        # Systematic: as many rows as the probabilities add up to, to within one.
        ends = p.cumsum(0, dtype=torch.float64) + torch.rand((), generator=self.generator, dtype=torch.float64).item()
        index = (ends.floor() > (ends - p).floor()).nonzero().squeeze(1)
        return Decision(index, 1.0 / p[index])

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


class BatchImportancePolicy(DrawingPolicy):
    """``importance`` within a batch, by what a scorer says of it now: round(rate * B) rows to within one.

    Drawn in proportion to their losses, but for a share of draws that ignore them, none twice.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        if not 0.0 < uniform <= 1.0:
            raise UserError(f"uniform {uniform}: wanted more than 0, or weights are without bound, and at most 1")
        self.uniform = uniform

    @property
    def target(self) -> float:
        return self.rate

    def probability(self, losses: Tensor) -> Tensor:
        losses = losses.clamp(min=0.0)  # one less a reference's may be below
        count, mean = self.rate * len(losses), losses.mean().clamp(min=1e-30)
        p = (1.0 - self.uniform) * losses / mean + self.uniform
        scale = torch.tensor(self.rate, device=losses.device)
        for _ in range(4):  # what is cut off above 1 goes to the others
            scale = scale * (count / (p * scale).clamp(max=1.0).sum())
        return (p * scale).clamp(max=1.0)

    def likely_rows(self, rows: int) -> range:
        count = max(1, round(self.rate * rows))
        return range(rows, rows + 1) if self.before_loading else range(max(1, count - 1), min(rows, count + 1) + 1)


class BatchInfoBatchPolicy(DrawingPolicy):
    """``infobatch`` within a batch, by what a scorer says of it now.

    Rows whose loss is below the batch's mean are left out with probability ``prune``, or count 1 / (1 - prune).
    The rate follows from the losses; ``rate`` is not used.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        if not 0.0 <= prune < 1.0:
            raise UserError(f"prune {prune}: wanted a probability, at least 0 and below 1")
        self.prune = prune

    def probability(self, losses: Tensor) -> Tensor:
        return torch.where(losses < losses.mean(), 1.0 - self.prune, 1.0)

    def likely_rows(self, rows: int) -> range:
        return range(min(rows, max(1, rows // 2)), rows + 1)


class MaskedPolicy(Policy):
    """The original system's step, for comparison only: it saves nothing.

    All rows go forward twice, the first time to be scored, and backward once; rows that are not selected are masked
    out of the loss, which is divided by the number selected. That is four thirds of a dense step's work, whatever the
    rate. Scoring is in training mode and float32, as there: BatchNorm's statistics move in it. So is the control law
    (``original.PackageLaw``), which waits for the device in every step and cannot reach every rate. Its settings
    besides: Adam at 1e-3, ``clip_norm=1``.
    """

    name = "masked"
    scored_by = "self"
    masks = True

    def __init__(self, rate: float = 0.4, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.law = PackageLaw(self.rate)
        self.clamped, self.steps = 0, 0

    @property
    def target(self) -> float:
        return self.rate

    def score(self, batch: Batch) -> Scores:
        with torch.no_grad():
            return Scores(batch.targets, self.scorer.criterion, logits=forward(self.scorer.model, batch.inputs))

    def select(self, scores: Scores | None, batch: Batch) -> Kept:
        assert scores is not None
        p = scores.logits.softmax(-1)
        entropy = -(p * (p + 1e-8).log()).sum(-1)
        significance = 0.7 * scores.losses + 0.3 * entropy
        mask = significance > float(self.law.threshold)
        least = self.law.least(batch.rows)
        if int(mask.sum()) < least:
            mask = torch.zeros_like(mask).index_fill_(0, significance.topk(min(least, batch.rows)).indices, True)
        count = int(mask.sum())
        self.law.observe(count / batch.rows)
        self.steps += 1
        self.clamped += not 0.5 < self.law.threshold < 10.0
        everything = torch.arange(batch.rows, device=mask.device)
        return Kept(batch.inputs, batch.targets, count, everything, mask.float(), max(count, 1))

    def trace(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(float(self.law.rate)), torch.tensor(float(self.law.threshold))

    def warnings(self, rate: float | None) -> list[str]:
        found = ["masked is the original system's step, for comparison only: every row goes forward twice and backward"]
        if self.clamped:
            found.append(f"masked's threshold was at its clamp in {self.clamped} of {self.steps} steps")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        return {"law": [float(value) for value in vars(self.law).values()], "counts": (self.clamped, self.steps)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.law = PackageLaw(*state["law"])
        self.clamped, self.steps = state["counts"]


class HistoryPolicy(Policy):
    """Chooses by each row's loss when it was last trained on: nothing is scored, nothing left out is loaded.

    The next choice hangs on the last losses, so on an accelerator it waits for the step before it.
    """

    table: ScoreTable | None = None
    _observed: tuple[Tensor, Tensor] | None = None  # not yet in the table

    @property
    def before_loading(self) -> bool:
        return True

    def prepare(
        self, rows: int | None, targets: Tensor | None = None, copies: Callable[[], Tensor | None] | None = None
    ) -> None:
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


class AdaptivePolicy(Policy):
    """As many rows as are offered, of the whole data set, each as often as it is worth; see ``worth.Worth``.

    Rows whose labels seem wrong come seldom, copies of one input as often together as any other, and towards the end
    every class as often as the others (``balance``; off where the classes' shares in the data are those that count).
    On data that gives no reason for any of it this is an epoch as any other. It costs no forward pass. ``rate`` is not
    used, and neither are the trainer's dense phases. Rows without numbers, of a stream, are trained on as they come.
    Processes that train together, each on the whole data set, want seeds of their own.
    """

    name = "adaptive"
    phased = False

    def __init__(self, rate: float = 1.0, seed: int = 0, balance: bool = True) -> None:
        super().__init__(rate, seed)
        self.balance = balance
        self.law: Worth | None = None
        self.progress = 0.0
        self._observed: tuple[Tensor, Tensor, Any] | None = None  # not yet in the law
        self._state: Mapping[str, Any] | None = None  # to go on from, once there is a law
        self._stream = False

    @property
    def before_loading(self) -> bool:
        return True

    def prepare(
        self, rows: int | None, targets: Tensor | None = None, copies: Callable[[], Tensor | None] | None = None
    ) -> None:
        self._stream = rows is None
        if rows is None:
            return
        if self.law is None:
            balance_from = 0.6 if self.balance else None
            found = None if copies is None else copies()
            self.law = Worth(rows, targets, found, seed=self.seed, balance_from=balance_from)
            if self._state is not None:
                self.law.load_state_dict(self._state)
        elif self.law.rows != rows:
            raise UserError(f"the policy {self.name} knows {self.law.rows} rows: wanted as many, given {rows}")

    def at(self, progress: float) -> None:
        self.progress = progress

    def choose(self, offer: Offer) -> Choice | None:
        if self.law is None:
            return None
        self.up_to_date()
        return Choice(self.law.draw(len(offer.ids), self.progress))

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        self.up_to_date()
        self._observed = ids, losses, logits

    def up_to_date(self) -> None:
        """Tell the law of the rows last trained on: here, not in ``observe``, for it waits for the device."""
        if self._observed is not None and self.law is not None:
            self.law.update(*self._observed)
            self._observed = None

    def warnings(self, rate: float | None) -> list[str]:
        if self._stream:
            return ["rows without numbers: every one was trained on as it came; wanted data held in memory"]
        self.up_to_date()
        found = []
        if self.law is not None and (new := int(self.law.probability.isnan().count_nonzero())):
            found.append(f"{new} of {self.law.rows} rows were never trained on: the run was too short for their past")
        if self.law is not None and self.law.noise >= NOISE:
            found.append(
                f"{self.law.noise:.0%} of the labels seem wrong: rows whose label the model denies came seldom"
            )
        if self.law is not None and self.law.invalid:
            found.append(f"{self.law.invalid} losses were not finite and left out of account")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        self.up_to_date()
        return {} if self.law is None else self.law.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed, self._state = None, state or None
        if self.law is not None and state:
            self.law.load_state_dict(state)


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


def check_rate(rate: float) -> float:
    """The rate, if it is in (0, 1]; otherwise a UserError."""
    if not 0.0 < rate <= 1.0:
        raise UserError(f"rate {rate}: wanted more than 0 and at most 1")
    return rate
