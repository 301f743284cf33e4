"""Facts about the rows of batches: those that teach nothing, exact copies, and how concentrated a statistic is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_training.samplers.importance import inclusion_probability, relative_probability
from sparse_training.samplers.infobatch import prune_probability

TOP = (10, 25, 50)  # percent of the rows
RATES = tuple(number / 20 for number in range(1, 21))


@dataclass(frozen=True)
class Concentration:
    """How much of a statistic's sum the rows with the largest values hold.

    Attributes:
        top: share of the sum, in [0, 1], that the largest 10%, 25% and 50% of the rows hold, by that percentage.
        effective: effective sample size, (sum v)^2 / (n sum v^2), in (0, 1]: 1 where all rows are alike.
    """

    top: dict[int, float]
    effective: float


def concentration(values: Tensor) -> Concentration | None:
    """Measure how concentrated a statistic is.

    Args:
        values: finite values of the rows, at least 0, [n].

    Returns:
        The concentration; None where no row has a value above 0.
    """
    total = float(values.sum())
    if not len(values) or total <= 0.0:
        return None
    ordered = values.double().sort(descending=True).values
    held = {percent: float(ordered[: max(1, round(len(values) * percent / 100))].sum()) / total for percent in TOP}
    return Concentration(held, total * total / (len(values) * float(ordered.square().sum())))


def noise(squares: Tensor, probability: Tensor) -> float:
    """Mean square of a gradient that keeps rows with a probability and weights them by its inverse, over the dense one.

    Args:
        squares: squared gradient norms of the rows, [n].
        probability: probability of keeping each row, above 0, or its expected number of draws; [n].

    Returns:
        1 for the dense gradient; 1/r for random rows at rate r.
    """
    squares = squares.double()
    return float((squares / probability.double()).sum() / squares.sum().clamp(min=1e-300))


def infobatch(losses: Tensor, squares: Tensor) -> tuple[float, float]:
    """Rate and noise of unbiased pruning: half of the rows below the mean loss left out, the others weighted."""
    probability = 1.0 - prune_probability(losses, losses.mean())
    return float(probability.mean()), noise(squares, probability)


def importance(losses: Tensor, squares: Tensor, most: float) -> tuple[float, float]:
    """Least rate, in hundredths, of draws by the losses, with replacement, whose noise is at most ``most``."""
    whole = noise(squares, relative_probability(losses.double().clamp(min=0.0), losses.double().mean(), 0.1))
    rate = min(1.0, max(RATES[0], math.ceil(100 * whole / most) / 100))
    return rate, whole / rate


def within_batch(losses: Tensor, squares: Tensor, most: float) -> tuple[float, float]:
    """Least rate, in twentieths, of draws by the losses, no row twice, whose noise is at most ``most``."""
    for rate in RATES:
        found = noise(squares, inclusion_probability(losses.double(), rate))
        if found <= most:
            return rate, found
    return 1.0, 1.0


def fewest(norms: Tensor, share: float) -> float:
    """Smallest fraction of the rows, in hundredths, that holds a share of the sum of the gradient norms."""
    ordered = norms.double().sort(descending=True).values.cumsum(0)
    reached = int((ordered < share * float(ordered[-1])).sum()) + 1
    return math.ceil(100 * min(reached, len(norms)) / len(norms)) / 100


@dataclass
class RowCounts:
    """Counts of rows and targets that teach nothing, over the batches that were added.

    Attributes:
        rows: number of rows.
        targets: number of targets: rows, or the tokens or pixels in them.
        ignored: number of targets that do not count.
        positions: number of positions of the batches' attention masks; 0 where there is none.
        padded: number of those that are padding.
        graded: number of targets that count and whose gradient was seen.
        flat: number of those whose gradient is exactly 0.
        hashed: number of rows compared with the others of their pass.
        copies: number of those whose inputs are those of an earlier row.
    """

    rows: int = 0
    targets: int = 0
    ignored: int = 0
    positions: int = 0
    padded: int = 0
    graded: int = 0
    flat: int = 0
    hashed: int = 0
    copies: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def begin_pass(self) -> None:
        """Forget the rows compared so far: another pass has the same ones again."""
        self._seen.clear()

    def add_targets(self, targets: Tensor, counting: Tensor | None) -> None:
        """Add a batch's targets, [B, ...], and a mask of those that count, None for all."""
        self.rows += targets.shape[0]
        self.targets += targets.numel() if counting is None else counting.numel()
        self.ignored += 0 if counting is None else int((~counting).sum())

    def add_padding(self, inputs: Any) -> None:
        """Add a batch's attention mask, where its inputs are a mapping that has one of 0 and 1."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            self.positions += mask.numel()
            self.padded += int((mask == 0).sum())

    def add_gradients(self, squares: Tensor, counting: Tensor | None) -> None:
        """Add squared norms of the gradients of targets or rows, and the mask of those that count, None for all."""
        squares = squares if counting is None else squares[counting]
        self.graded += squares.numel()
        self.flat += int((squares == 0.0).sum())

    def add_inputs(self, inputs: Any, rows: int) -> None:
        """Compare a batch's rows with the rows of this pass seen before."""
        leaves = pytree.tree_leaves(inputs)
        parts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) and leaf.numel()]
        if not parts:
            return
        flat = [part.detach().cpu().contiguous().reshape(rows, -1).view(torch.uint8).numpy() for part in parts]
        for row in range(rows):
            digest = hashlib.blake2b(digest_size=16)
            for part in flat:
                digest.update(part[row].tobytes())
            self.hashed += 1
            self.copies += (key := digest.digest()) in self._seen
            self._seen.add(key)

    def share(self, count: str, of: str) -> float | None:
        """Return one count as a share of another; None where that is 0."""
        whole: int = getattr(self, of)
        part: int = getattr(self, count)
        return part / whole if whole else None
