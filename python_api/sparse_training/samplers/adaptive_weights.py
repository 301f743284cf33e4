"""How much each row of a data set is worth training on, by what the model made of it, and draws by that.

A run is a row of passes. Before each of them every row gets a worth, the product of

``honest``   the probability that its label is right. Labels replaced at random spread evenly over all pairs of
    classes, whereas a model's honest confusions sit in few of them; so the median over the pairs, of how many
    of the rows predicted as one class are labelled as the other, is what noise puts into each of them, and
    times the number of the others it is the fraction e of wrong labels. (A median in place of the matrix that
    Northcutt et al., "Confident Learning", JAIR 2021, take whole.) A model trained on such labels gives a
    right one at least r = e / (classes - 1), which is what the noise alone gives; a row whose label it gives
    probability q, and another class most of it, is honest with probability (1 - e) (q - r) / (q (1 - e - r)).
    Below ``NOISE`` the estimate counts as none.
``single``   one by the number of rows that have the same inputs: copies share the draws of one row.
``new``      from 1 for a row whose label had a probability of at most 0.9 down to ``learned`` for one that the
    model was sure of. It is 1 for all by default: nothing was found to gain by less.
``share``    of its class. From ``balance_from`` of the run on, every class is drawn equally often; before it,
    as often as it comes: balancing from the start teaches the rare rows by heart (deferred re-weighting: Cao
    et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019; Kang et al.,
    "Decoupling Representation and Classifier", ICLR 2020). It assumes that all classes matter alike.

A row comes in a pass as often as its worth, the mean of all worths being 1, to within one, and what is left of it
counts in the next pass. Where nothing sets rows apart, passes are epochs. There are no weights: what is drawn more
often counts more, on purpose. The rows of a class lie evenly apart in a pass, so that every batch has its share of each
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
    """What the model made of each of ``rows`` rows when it was last trained on, and draws by that.

    Twelve bytes a row, four more for its class where it has one, four where there are copies, and eight for each row
    still to come in a pass.

    Args:
        rows: of the data set.
        targets: int64 [rows], their classes; None, or any other shape or dtype or a negative number, where rows
            are not of one class each: then only ``new`` is told apart.
        duplicate_counts: int64 [rows], how many rows have the same inputs as each, itself included; None for 1.
        learned: worth of a row that the model was sure of, in (0, 1].
        balance_from: progress from which every class is drawn equally often; None for never.
        seed: with the number of a pass it determines its order.

    Raises:
        UserError: an argument out of range.
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
            raise UserError(f"{rows} rows to draw from: wanted at least 1")
        if not 0.0 < learned <= 1.0:
            raise UserError(f"learned {learned}: wanted more than 0, or rows are never seen again, and at most 1")
        self.rows, self.learned, self.balance_from, self.seed = rows, learned, balance_from, seed
        self.single = (
            None if duplicate_counts is None or int(duplicate_counts.max()) == 1 else 1.0 / duplicate_counts.float()
        )  # float32 [rows]
        self.targets = _classes(targets, rows)
        self.classes = 0 if self.targets is None else int(self.targets.max()) + 1
        self.probability = torch.full((rows,), torch.nan)  # float32 [rows], of the label; NaN before a row's first time
        self.predicted = torch.full((rows,), -1, dtype=torch.int32)  # [rows], the class if the model was SURE, or -1
        self.due = torch.rand(rows, generator=self._generator(-1))  # float32 [rows], in [0, 1): left from passes before
        self.noise = 0.0  # fraction of wrong labels, as estimated when the pass began
        self.invalid = 0  # losses that were not finite
        self.passes = 0
        self.balanced = False
        self.order = torch.empty(0, dtype=torch.int64)  # rows still to come in this pass

    # --- what is known of rows ------------------------------------------------------------------

    def update(self, index: Tensor, losses: Tensor, logits: Any = None) -> None:
        """Enter what the model made of the rows in ``index``, before it learned from them.

        Args:
            index: int64 [n]; of a row that is there twice, the last counts.
            losses: [n]. One that is not finite is counted, and its row stays what it was.
            logits: [n, classes]; of any other shape, the label's probability is exp(-loss).

        Raises:
            UserError: tensors that do not fit one another; IndexError: a row that there is not.
        """
        rows, losses = one_per_row(index, losses, self.rows)
        if self.targets is not None and isinstance(logits, Tensor) and _one_a_class(logits, self.classes):
            if len(logits) != len(rows):
                raise UserError(f"logits of {len(logits)} rows for {len(rows)}: wanted one a row")
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
        """The fraction of labels that are wrong, replaced at random; 0 where there are too few rows to tell."""
        k = self.classes
        if self.targets is None or k < 3 or k * k > self.rows:
            return 0.0
        sure = (self.predicted >= 0) & (self.predicted < k)  # a model may have classes that no row is of
        pairs = torch.bincount(self.targets[sure].long() * k + self.predicted[sure], minlength=k * k).view(k, k)
        shares = pairs / pairs.sum(0).clamp(min=1)  # of the rows predicted as a class, by their labels
        return (k - 1) * float(shares[~torch.eye(k, dtype=torch.bool)].median())

    def worth(self) -> Tensor:
        """float32 [rows], at least 0, by the present estimate of the noise."""
        q = self.probability
        worth = self.learned + (1.0 - self.learned) * ((1.0 - q) / KNOWN).clamp(max=1.0)
        if self.targets is not None and self.noise >= NOISE:
            r = self.noise / (self.classes - 1)
            honest = (1.0 - self.noise) * (q - r) / (q * (1.0 - self.noise - r)).clamp(min=1e-12)
            doubted = (self.predicted >= 0) & (self.predicted != self.targets)
            worth = torch.where(doubted, worth * honest.clamp(0.0, 1.0), worth)
        worth = worth.nan_to_num(1.0)  # of rows not seen yet
        single = torch.ones(self.rows) if self.single is None else self.single
        worth = worth * single
        if self.targets is None:
            return worth
        # No class gains or loses by what is known of its rows; only by balance.
        targets = self.targets.long()
        count, sums = (torch.bincount(targets, part.double(), self.classes) for part in (single, worth))
        wanted = (count > 0).double() if self.balanced else count
        return worth * (wanted / sums.clamp(min=1e-12)).float()[targets]

    # --- drawing --------------------------------------------------------------------------------

    def draw(self, count: int, progress: float) -> Tensor:
        """int64 [count]: the next rows to train on, ``progress``, 0 to 1, being how far the run is."""
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
        """A new pass."""
        self.noise = self.estimate_noise()
        worth = self.worth()
        worth = worth * (self.rows / worth.sum(dtype=torch.float64)).float()
        # Epochs stay epochs: a worth of 1 but for rounding is 1.
        due = self.due + torch.where((worth - 1.0).abs() < 1e-4, 1.0, worth)
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

    _KEPT = ("probability", "predicted", "due", "order", "noise", "invalid", "passes", "balanced")

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors; the tensors are those in use, not copies."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where the state is of another number of rows."""
        if len(state["probability"]) != self.rows:
            raise UserError(f"a state of {len(state['probability'])} rows: wanted one of {self.rows}")
        for name in self._KEPT:
            value = state[name]
            setattr(self, name, value.cpu().clone() if isinstance(value, Tensor) else value)


def spread(ids: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """The ids, those of a group evenly apart: any n in a row are of each group as many as its share of n, to within 2.

    Args:
        ids: int64 [n], in random order; those of a group stay in it.
        groups: integers [n], at least 0, of each of ``ids``.
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
    """int32 [rows], on the CPU, where the targets are one class a row."""
    if targets is None or targets.shape != (rows,) or targets.is_floating_point() or targets.is_complex():
        return None
    return None if int(targets.min()) < 0 else targets.detach().int().cpu()
