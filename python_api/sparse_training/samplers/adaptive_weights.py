"""Sampling weights of the rows of a data set, by three switches, and draws by them.

A run is a sequence of passes. Before each of them every row is given a weight, the product of the factors that are
switched on:

- ``denoise``, the probability that a row's label is right. Labels replaced at random spread evenly over all pairs of
  classes, whereas a model's genuine confusions concentrate in few of them. So the median over the pairs, of the
  fraction of the rows predicted as one class that are labelled as the other, is the share of noise in each pair. Times
  the number of other classes it is the fraction e of wrong labels. (A median in place of the matrix that Northcutt et
  al., "Confident Learning", JAIR 2021, use.) A model trained on such labels gives a right one at least
  r = e / (classes - 1), which the noise alone gives. A row whose label the model gives probability q, and another
  class most of it, is clean with probability (1 - e) (q - r) / (q (1 - e - r)). Below ``NOISE`` the estimate counts as
  no noise. The probability counts as at least ``RECHECK``, so that a row denied once is drawn, and judged, again.
- ``duplicate_counts``, 1 / (number of rows that have the same inputs): duplicates share the draws of one row.
- ``balance_from``, the class's share: from that fraction of the run on, every class is drawn equally often; before it,
  as often as it occurs, because balancing from the start memorises the rare rows (deferred re-weighting: Cao et al.,
  "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019; Kang et al., "Decoupling
  Representation and Classifier", ICLR 2020).
- ``learned``, from 1 for a row whose label had a probability of at most 0.9 down to ``learned`` for one that the model
  was sure of. It is 1 for all rows by default: no gain was found from less.

Weights are scaled to a mean of 1, and none is above ``MAX_DRAWS``. A pass draws a row floor(w) or ceil(w) times, and
the remainder carries over to the next pass. Where nothing distinguishes rows, passes are epochs. There are no
importance weights: rows drawn more often count more, on purpose. The rows of a class are spaced evenly in a pass, so
that every batch has its share of each (Zhao and Zhang, "Accelerating Minibatch Stochastic Gradient Descent using
Stratified Sampling", 2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import assign
from sparse_training.arguments import check_fraction, check_integer, check_number
from sparse_training.errors import UserError
from sparse_training.samplers.score_table import one_per_row

SWITCHES = ("denoise", "deduplicate", "balance")
NOISE = 0.05  # least fraction of wrong labels that is acted upon: an immature model's confusions look like some
SURE = 0.5  # least probability of a class that counts as a prediction
BALANCE_FROM = 0.6  # of a run: by then common rows are known
KNOWN = 0.1  # a row is wholly new down to this distance of its label's probability from 1
RECHECK = 0.1  # least factor of a row whose label is denied: it is drawn at least once in ten passes
MAX_DRAWS = 10.0  # of a row in a pass: a class of one row in thousands would be drawn hundreds of times


class SamplingWeights:
    """Sampling weights of the rows of a data set, from the model's last output for each, and draws by them.

    It takes twelve bytes a row, four more for its class where it has one, four where there are duplicates, and eight
    for each row still to come in a pass.

    Args:
        rows: number of rows of the data set, at least 1.
        targets: classes of the rows, integers [rows], at least 0; ``denoise`` and ``balance_from`` need them. None (the
            default), or targets of another shape or dtype, where rows are not of one class each.
        duplicate_counts: number of rows that have the same inputs as each, itself included, int64 [rows]; None (the
            default) for 1.
        denoise: draw rows with suspected label errors rarely. Default False.
        learned: weight of a row that the model was sure of, in (0, 1]. Default 1.
        balance_from: fraction of the run from which every class is drawn equally often, in [0, 1]; None (the default)
            for never.
        seed: seed of the passes' orders. Default 0.

    Attributes:
        probability: float32 [rows], the model's probability of the label; NaN before a row's first time.
        predicted: int32 [rows], the predicted class if its probability was above ``SURE``, otherwise -1.
        noise: estimated fraction of wrong labels, as of the current pass's start.
        invalid: number of losses that were not finite.
        passes: number of passes begun.
        balanced: True once classes are drawn equally often.

    Raises:
        UserError: an argument is out of range, or a switch needs classes and rows have none.
    """

    def __init__(
        self,
        rows: int,
        targets: Tensor | None = None,
        duplicate_counts: Tensor | None = None,
        *,
        denoise: bool = False,
        learned: float = 1.0,
        balance_from: float | None = None,
        seed: int = 0,
    ) -> None:
        check_integer("rows", rows, 1)
        check_fraction("learned", learned)  # at 0 learned rows would never be seen again
        if balance_from is not None:
            check_number("balance_from", balance_from, "in [0, 1] or None", lambda x: 0 <= x <= 1)
        self.rows, self.learned, self.balance_from, self.seed = rows, learned, balance_from, seed
        self.denoise = denoise
        self._news: list[str] = []
        self.duplicate_weight: Tensor | None = None  # float32 [rows]; None for 1
        if duplicate_counts is not None and int(duplicate_counts.max()) != 1:
            self.duplicate_weight = 1.0 / duplicate_counts.float()
            copies = int((duplicate_counts > 1).count_nonzero())
            self._news.append(f"deduplicate: {copies} of {rows} rows have copies, which share the draws of one row")
        self.targets = _classes(targets, rows)
        if self.targets is None and (denoise or balance_from is not None):
            switch = "denoise" if denoise else "balance"
            raise UserError(
                f"`{switch}` needs the class of each of the {rows} rows, integers [{rows}] of at least 0, got "
                f"{'none' if targets is None else f'{targets.dtype} {list(targets.shape)}'}"
            )
        self.classes = 0 if self.targets is None else int(self.targets.max()) + 1
        if denoise and (self.classes < 3 or self.classes**2 > rows):
            raise UserError(
                "`denoise` needs at least 3 classes and as many rows as pairs of them to estimate wrong labels, got "
                f"{self.classes} classes and {rows} rows"
            )
        self.probability = torch.full((rows,), torch.nan, dtype=torch.float32, device="cpu")
        self.predicted = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
        self.due = torch.rand(
            rows, generator=self._generator(-1), dtype=torch.float32, device="cpu"
        )  # float32 [rows], in [0, 1): carried over
        self.noise, self._doubted = 0.0, False
        self.invalid = 0
        self.passes = 0
        self.balanced = False
        self.order = torch.empty(0, dtype=torch.int64, device="cpu")  # rows still to come in this pass

    # --- what is known of rows ------------------------------------------------------------------

    def update(self, index: Tensor, losses: Tensor, logits: Any = None) -> None:
        """Enter the model's output for the rows in ``index``, from before it learned from them.

        Args:
            index: row numbers, int64 [n]; if a row occurs twice, its last output counts.
            losses: losses of the rows, [n]. One that is not finite is counted, and its row keeps what it had.
            logits: class logits, [n, classes], which ``denoise`` needs. None (the default), or any other shape: the
                label's probability is then exp(-loss), and no class is predicted.

        Raises:
            UserError: the tensors do not fit one another, or ``denoise`` gets no class logits.
            IndexError: there is no such row.
        """
        rows, losses = one_per_row(index, losses, self.rows)
        if self.targets is not None and isinstance(logits, Tensor) and _one_a_class(logits, self.classes):
            if len(logits) != len(rows):
                raise UserError(f"`logits` must have one row for each of {len(rows)} rows, got {len(logits)}")
            p = logits.detach().float().softmax(1).cpu()
            largest, at = p.max(1)
            predicted = torch.where(largest > SURE, at, -1)
            probability = p.gather(1, self.targets[rows].long()[:, None]).squeeze(1)
        else:
            if self.denoise:
                shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise UserError(f"`denoise` needs class logits [rows, {self.classes} or more], got {shape}")
            predicted = torch.full_like(rows, -1)
            probability = (-losses).exp().clamp(max=1.0)
        finite = (losses + probability).isfinite()
        if not finite.all():
            self.invalid += int((~finite).sum())
            rows, probability, predicted = rows[finite], probability[finite], predicted[finite]
        assign(self.probability, rows, probability)
        assign(self.predicted, rows, predicted)

    def estimate_noise(self) -> float:
        """Estimate the fraction of labels that were replaced at random; 0 where there are too few rows to tell."""
        k = self.classes
        if self.targets is None or k < 3 or k * k > self.rows:
            return 0.0
        sure = (self.predicted >= 0) & (self.predicted < k)  # a model may have classes that no row is of
        pairs = torch.bincount(self.targets[sure].long() * k + self.predicted[sure], minlength=k * k).view(k, k)
        shares = pairs / pairs.sum(0).clamp(min=1)  # of the rows predicted as a class, by their labels
        return (k - 1) * float(shares[~torch.eye(k, dtype=torch.bool, device="cpu")].median())

    def weights(self) -> Tensor:
        """Expected draws of each row in a pass, by the present estimate of the noise: float32 [rows], 1 on average."""
        return _capped(self._relative_weights())

    def _relative_weights(self) -> Tensor:
        """Weights of the rows, above 0 and not yet scaled: float32 [rows]."""
        q = self.probability
        novelty = self.learned + (1.0 - self.learned) * ((1.0 - q) / KNOWN).clamp(max=1.0)
        weight = novelty
        if self.targets is not None and self.noise >= NOISE:
            r = self.noise / (self.classes - 1)
            p_clean = (1.0 - self.noise) * (q - r) / (q * (1.0 - self.noise - r)).clamp(min=1e-12)
            doubted = (self.predicted >= 0) & (self.predicted != self.targets)
            weight = torch.where(doubted, weight * p_clean.clamp(RECHECK, 1.0), weight)
        weight = weight.nan_to_num(1.0)  # of rows not seen yet
        duplicate_weight = (
            torch.ones(self.rows, dtype=torch.float32, device="cpu")
            if self.duplicate_weight is None
            else self.duplicate_weight
        )
        weight = weight * duplicate_weight
        if self.targets is None:
            return weight
        # No class gains or loses by what is known of its rows; only by balance.
        targets = self.targets.long()
        count, sums = (torch.bincount(targets, part.double(), self.classes) for part in (duplicate_weight, weight))
        share = (count > 0).double() if self.balanced else count
        return weight * (share / sums.clamp(min=1e-12)).float()[targets]

    # --- drawing --------------------------------------------------------------------------------

    def draw(self, count: int, progress: float) -> Tensor:
        """Draw the next rows to train on.

        Args:
            count: number of rows.
            progress: fraction of the run that is done, 0 to 1.

        Returns:
            Row numbers: int64 [count].
        """
        if not self.balanced and self.balance_from is not None and progress >= self.balance_from:
            self.balanced = True
            self._news.append(
                f"balance: every class is drawn equally often from now on, a row at most {MAX_DRAWS:g} times a pass"
            )
            if self.targets is not None:
                counts = torch.bincount(self.targets)
                if counts.max() > 2 * counts[counts > 0].min():  # otherwise it can wait for the end of the pass
                    self.order = self.order[:0]
        parts, missing = [], count
        while missing:
            if not len(self.order):
                self._begin()
            part, self.order = self.order[:missing], self.order[missing:]
            parts.append(part)
            missing -= len(part)
        return torch.cat(parts)

    def _begin(self) -> None:
        """Begin a new pass."""
        before, self.noise = self.noise, self.estimate_noise() if self.denoise else 0.0
        if self.noise >= NOISE > before and not self._doubted:
            self._doubted = True
            self._news.append(
                f"denoise: {self.noise:.0%} of the labels seem wrong; rows whose label the model denies are drawn "
                f"rarely, at least once in {1 / RECHECK:.0f} passes"
            )
        weight = self.weights()
        # Epochs stay epochs: a weight of 1 but for rounding is 1.
        due = self.due + torch.where((weight - 1.0).abs() < 1e-4, 1.0, weight)
        times = due.floor()
        self.due = due - times
        ids = torch.repeat_interleave(torch.arange(self.rows, device="cpu"), times.long())
        generator = self._generator(self.passes)
        ids = ids[torch.randperm(len(ids), generator=generator, device="cpu")]
        self.order = ids if self.targets is None else spread(ids, self.targets[ids], generator)
        self.passes += 1

    def take_news(self) -> list[str]:
        """Return what has begun since the last call, in sentences."""
        news, self._news = self._news, []
        return news

    def _generator(self, number: int) -> torch.Generator:
        # PyTorch's CPU generator reads the low 32 bits of a seed.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**32)

    # --- state ----------------------------------------------------------------------------------

    _STATE = ("probability", "predicted", "due", "order", "noise", "invalid", "passes", "balanced")

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors; the tensors are those in use, not copies."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state of ``state_dict``.

        Raises:
            UserError: the state has another number of rows.
        """
        if len(state["probability"]) != self.rows:
            raise UserError(f"the state must be of {self.rows} rows, got {len(state['probability'])}")
        for name in self._STATE:
            value = state[name]
            setattr(self, name, value.cpu().clone() if isinstance(value, Tensor) else value)
        self._doubted = self.noise >= NOISE
        self._news = []


def _capped(weight: Tensor) -> Tensor:
    """Scale weights to a mean of 1 with none above ``MAX_DRAWS``; what is cut off goes to the other rows."""
    weight = weight * (len(weight) / weight.sum(dtype=torch.float64)).float()
    while (weight > MAX_DRAWS).any():
        capped = weight >= MAX_DRAWS
        left = len(weight) - MAX_DRAWS * int(capped.count_nonzero())
        rest = weight[~capped].sum(dtype=torch.float64).clamp(min=1e-12)
        weight = torch.where(capped, MAX_DRAWS, weight * (left / rest).float())
    return weight


def spread(ids: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Space the ids of each group evenly: any n in a row hold each group's share of n, to within 2.

    Args:
        ids: int64 [n], in random order; those of a group stay in it.
        groups: group of each of ``ids``, integers [n], at least 0.
        generator: generator of the groups' offsets.

    Returns:
        The ids in their new order: int64 [n].
    """
    order = groups.argsort(stable=True)
    count = torch.bincount(groups)
    first = count.cumsum(0) - count
    group = groups[order].long()
    offset = torch.rand(len(count), generator=generator, dtype=torch.float64, device="cpu")
    place = (torch.arange(len(ids), device="cpu") - first[group] + offset[group]) / count[group]
    return ids[order[place.argsort()]]


def _one_a_class(logits: Tensor, classes: int) -> bool:
    return logits.ndim == 2 and logits.shape[1] >= classes


def _classes(targets: Tensor | None, rows: int) -> Tensor | None:
    """Classes as int32 [rows], on the CPU, where the targets are one class a row; otherwise None."""
    if targets is None or targets.shape != (rows,) or targets.is_floating_point() or targets.is_complex():
        return None
    return None if int(targets.min()) < 0 else targets.detach().int().cpu()


def check_switches(chosen: Sequence[str]) -> None:
    """Refuse a choice of switches that says nothing or that cannot be.

    Raises:
        UserError: no switch, an unknown one, or one twice.
    """
    if not chosen or set(chosen) - set(SWITCHES) or len(set(chosen)) != len(chosen):
        forms = ", ".join(f"adaptive+{switch}" for switch in SWITCHES)
        raise UserError(
            f"`adaptive` must have at least one of its switches {', '.join(SWITCHES)}, each once, got "
            f"{'+'.join(chosen) or 'none'}; name it as {forms}, or several such as adaptive+denoise+balance"
        )
