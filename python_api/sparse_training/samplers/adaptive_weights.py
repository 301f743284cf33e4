"""Sampling weights of the rows of a data set, by what the model made of each, and draws by them.

A run is a sequence of passes. Before each of them every row is given a weight, the product of four factors:

- ``p_clean``: the probability that its label is right. Labels replaced at random spread evenly over all pairs of
  classes, whereas a model's genuine confusions concentrate in few of them. So the median over the pairs, of the
  fraction of the rows predicted as one class that are labelled as the other, is the share of noise in each pair. Times
  the number of other classes it is the fraction e of wrong labels. (A median in place of the matrix that Northcutt et
  al., "Confident Learning", JAIR 2021, use.) A model trained on such labels gives a right one at least
  r = e / (classes - 1), which the noise alone gives. A row whose label the model gives probability q, and another
  class most of it, is clean with probability (1 - e) (q - r) / (q (1 - e - r)). Below ``NOISE`` the estimate counts as
  no noise.
- ``duplicate_weight``: 1 / (number of rows that have the same inputs), so that duplicates share the draws of one row.
- ``novelty``: from 1 for a row whose label had a probability of at most 0.9 down to ``learned`` for one that the model
  was sure of. It is 1 for all rows by default: no gain was found from less.
- the class's share: from ``balance_from`` of the run on, every class is drawn equally often; before it, as often as it
  occurs, because balancing from the start memorises the rare rows (deferred re-weighting: Cao et al., "Learning
  Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019; Kang et al., "Decoupling Representation
  and Classifier", ICLR 2020). It assumes that all classes matter alike.

With weights scaled to a mean of 1, a pass draws a row floor(w) or ceil(w) times, and the remainder carries over to the
next pass. Where nothing distinguishes rows, passes are epochs. There are no importance weights: rows drawn more often
count more, on purpose. The rows of a class are spaced evenly in a pass, so that every batch has its share of each
(Zhao and Zhang, "Accelerating Minibatch Stochastic Gradient Descent using Stratified Sampling", 2014).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import assign
from sparse_training.errors import UserError
from sparse_training.samplers.score_table import one_per_row

NOISE = 0.05  # least fraction of wrong labels that is acted upon: an immature model's confusions look like some
SURE = 0.5  # least probability of a class that counts as a prediction
BALANCE_FROM = 0.6  # of a run: by then common rows are known
KNOWN = 0.1  # a row is wholly new down to this distance of its label's probability from 1


class SamplingWeights:
    """Sampling weights of the rows of a data set, from the model's last output for each, and draws by them.

    It takes twelve bytes a row, four more for its class where it has one, four where there are duplicates, and eight
    for each row still to come in a pass.

    Args:
        rows: number of rows of the data set, at least 1.
        targets: classes of the rows, int64 [rows]. None (the default), or any other shape or dtype or a negative
            number, where rows are not of one class each; then only novelty and duplicates count.
        duplicate_counts: number of rows that have the same inputs as each, itself included, int64 [rows]; None (the
            default) for 1.
        learned: weight of a row that the model was sure of, in (0, 1]. Default 1.
        balance_from: fraction of the run from which every class is drawn equally often, in [0, 1]; None for never.
            Default 0.6.
        seed: seed of the passes' orders. Default 0.

    Attributes:
        probability: float32 [rows], the model's probability of the label; NaN before a row's first time.
        predicted: int32 [rows], the predicted class if its probability was above ``SURE``, otherwise -1.
        noise: estimated fraction of wrong labels, as of the current pass's start.
        invalid: number of losses that were not finite.
        passes: number of passes begun.
        balanced: True once classes are drawn equally often.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        rows: int,
        targets: Tensor | None = None,
        duplicate_counts: Tensor | None = None,
        *,
        learned: float = 1.0,
        balance_from: float | None = BALANCE_FROM,
        seed: int = 0,
    ) -> None:
        if rows < 1:
            raise UserError(f"`rows` must be at least 1, got {rows}")
        if not 0.0 < learned <= 1.0:
            raise UserError(f"`learned` must be in (0, 1], got {learned}; at 0 learned rows would never be seen again")
        self.rows, self.learned, self.balance_from, self.seed = rows, learned, balance_from, seed
        self.duplicate_weight: Tensor | None = None  # float32 [rows]; None for 1
        if duplicate_counts is not None and int(duplicate_counts.max()) != 1:
            self.duplicate_weight = 1.0 / duplicate_counts.float()
        self.targets = _classes(targets, rows)
        self.classes = 0 if self.targets is None else int(self.targets.max()) + 1
        self.probability = torch.full((rows,), torch.nan)
        self.predicted = torch.full((rows,), -1, dtype=torch.int32)
        self.due = torch.rand(rows, generator=self._generator(-1))  # float32 [rows], in [0, 1): carried over
        self.noise = 0.0
        self.invalid = 0
        self.passes = 0
        self.balanced = False
        self.order = torch.empty(0, dtype=torch.int64)  # rows still to come in this pass

    # --- what is known of rows ------------------------------------------------------------------

    def update(self, index: Tensor, losses: Tensor, logits: Any = None) -> None:
        """Enter the model's output for the rows in ``index``, from before it learned from them.

        Args:
            index: row numbers, int64 [n]; if a row occurs twice, its last output counts.
            losses: losses of the rows, [n]. One that is not finite is counted, and its row keeps what it had.
            logits: class logits, [n, classes]. None (the default), or any other shape: the label's probability is
                then exp(-loss), and no class is predicted.

        Raises:
            UserError: the tensors do not fit one another.
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
        return (k - 1) * float(shares[~torch.eye(k, dtype=torch.bool)].median())

    def weights(self) -> Tensor:
        """Weights of the rows by the present estimate of the noise, at least 0, not yet scaled: float32 [rows]."""
        q = self.probability
        novelty = self.learned + (1.0 - self.learned) * ((1.0 - q) / KNOWN).clamp(max=1.0)
        weight = novelty
        if self.targets is not None and self.noise >= NOISE:
            r = self.noise / (self.classes - 1)
            p_clean = (1.0 - self.noise) * (q - r) / (q * (1.0 - self.noise - r)).clamp(min=1e-12)
            doubted = (self.predicted >= 0) & (self.predicted != self.targets)
            weight = torch.where(doubted, weight * p_clean.clamp(0.0, 1.0), weight)
        weight = weight.nan_to_num(1.0)  # of rows not seen yet
        duplicate_weight = torch.ones(self.rows) if self.duplicate_weight is None else self.duplicate_weight
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
        self.noise = self.estimate_noise()
        weight = self.weights()
        weight = weight * (self.rows / weight.sum(dtype=torch.float64)).float()
        # Epochs stay epochs: a weight of 1 but for rounding is 1.
        due = self.due + torch.where((weight - 1.0).abs() < 1e-4, 1.0, weight)
        times = due.floor()
        self.due = due - times
        ids = torch.repeat_interleave(torch.arange(self.rows), times.long())
        generator = self._generator(self.passes)
        ids = ids[torch.randperm(len(ids), generator=generator)]
        self.order = ids if self.targets is None else spread(ids, self.targets[ids], generator)
        self.passes += 1

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
    offset = torch.rand(len(count), generator=generator, dtype=torch.float64)
    place = (torch.arange(len(ids)) - first[group] + offset[group]) / count[group]
    return ids[order[place.argsort()]]


def _one_a_class(logits: Tensor, classes: int) -> bool:
    return logits.ndim == 2 and logits.shape[1] >= classes


def _classes(targets: Tensor | None, rows: int) -> Tensor | None:
    """Classes as int32 [rows], on the CPU, where the targets are one class a row; otherwise None."""
    if targets is None or targets.shape != (rows,) or targets.is_floating_point() or targets.is_complex():
        return None
    return None if int(targets.min()) < 0 else targets.detach().int().cpu()
