"""What each row of a data set scored when it was last trained on, and which rows to draw by that.

``ScoreTable`` keeps the scores; two laws draw by them, and rows that they leave out are neither loaded
nor run. Both are unbiased: a row that had probability p of being kept counts 1/p.

``Importance``  Draws with replacement, each row in proportion to its score, mixed with a share of draws
    that ignore the scores, which bounds every weight (defensive importance sampling: Hesterberg, 1995;
    Owen and Zhou, 2000; scores from a table: Schaul et al., "Prioritized Experience Replay", ICLR 2016).
    The rows of a batch are stratified: draw i of B falls in the i-th of B equal parts of the probability,
    so the variance is never above that of independent draws.
``InfoBatch``   In each epoch drops rows that score below the mean with probability r = 0.5, and counts
    the kept ones of them 1/(1-r) (Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic
    Data Pruning", ICLR 2024).

Every random number is a function of the seed, the step or the epoch, and the slot or the row (Philox),
so draws depend neither on threads nor on other generators, and the state is a few integers and the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels.sum_tree import SumTree, assign, uniform_double
from sparse_training.errors import UserError

# The laws' and the shuffle's numbers, apart from those that the gate draws with the same seed: in the
# step's high bits, where no run gets.
_IMPORTANCE, _INFOBATCH, _SHUFFLE = (law << 48 for law in (1, 2, 3))
_BLOCK = 1 << 14


class Drawn(NamedTuple):
    """Rows to train on."""

    ids: Tensor  # int64 [n], on the CPU
    weight: Tensor  # float32 [n]: 1/p, in units that make 1 the weight of a row of a plain epoch


class ScoreTable:
    """The last score of each of ``rows`` rows: four bytes a row, and an eighth of one for drawing.

    Args:
        rows: of the data set, or of this process's shard of it.
        cpp: see ``sparse_kernels.sum_tree``.
    """

    def __init__(self, rows: int, *, cpp: bool | None = None) -> None:
        if rows < 1:
            raise UserError(f"a table of {rows} rows: wanted at least 1")
        self.scores = torch.full((rows,), torch.nan)  # float32 [rows], NaN before a row's first score
        self.seen = 0  # rows that have a score
        self.invalid = 0  # scores that were refused
        self._tree = SumTree(self.scores, cpp=cpp)

    @property
    def rows(self) -> int:
        return len(self.scores)

    @property
    def total(self) -> float:
        return self._tree.total

    @property
    def mean(self) -> float:
        """Of the rows that have a score; 0 before there is one."""
        return self._tree.total / self.seen if self.seen else 0.0

    def update(self, index: Tensor, scores: Tensor) -> None:
        """Enter the scores of the rows in ``index``.

        Args:
            index: int64 [n]; of a row that is there twice, the last score counts.
            scores: [n], any floating dtype and device; reading them from an accelerator waits for it. A
                negative score counts as 0. One that is not finite is counted in ``invalid``, and its row
                keeps the score that it had.

        Raises:
            UserError: tensors that do not fit one another; IndexError: a row that the table has not.
        """
        index, scores = one_a_row(index, scores, self.rows)
        scores = scores.clamp(min=0.0)
        finite = scores.isfinite()
        if not finite.all():
            self.invalid += int((~finite).sum())
            index, scores = index[finite], scores[finite]
        new = self.scores[index].isnan()
        if new.any():
            self.seen += len(torch.unique(index[new]))
        assign(self.scores, index, scores)
        self._tree.update(index)

    def find(self, points: Tensor) -> Tensor:
        """int64: the rows at points, float64 in [0, 1), of the scores laid end to end."""
        return self._tree.find(points * self._tree.total)

    def age(self, keep: float) -> None:
        """Move every score towards the mean: score = mean + keep * (score - mean), with ``keep`` in [0, 1].

        A score says less of its row the longer ago it was taken. Reads and writes the whole table.
        """
        if not 0.0 <= keep <= 1.0:
            raise UserError(f"keep {keep}: wanted a fraction from 0 to 1")
        self.scores.mul_(keep).add_((1.0 - keep) * self.mean)
        self._tree.build()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "invalid": self.invalid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies; the sums are made again, bit for bit what they were."""
        if state["scores"].shape != self.scores.shape:
            raise UserError(f"a table of {len(state['scores'])} rows: wanted one of {self.rows}")
        self.scores.copy_(state["scores"])
        self.seen = self.rows - int(self.scores.isnan().count_nonzero())
        self.invalid = int(state["invalid"])
        self._tree.build()


def one_a_row(index: Tensor, scores: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """int64 [n] and float32 [n], both on the CPU, of scores of rows.

    Raises:
        UserError: not one score a row; IndexError: a row outside 0 to ``rows`` - 1.
    """
    index, scores = index.detach().reshape(-1).cpu(), scores.detach().reshape(-1).float().cpu()
    if index.shape != scores.shape:
        raise UserError(f"{len(scores)} scores for {len(index)} rows: wanted one a row")
    if len(index):
        low, high = index.aminmax()
        if low < 0 or high >= rows:
            raise IndexError(f"rows {int(low)} to {int(high)}: wanted 0 to {rows - 1}")
    return index, scores


class Importance:
    """Draws rows in proportion to their scores, after every row was drawn once.

    Rows without a score come first, in random order, none twice and with weight 1: that is an epoch as
    any other. From then on a draw takes row i with p = (1 - uniform) * score / total + uniform / rows,
    and its weight is 1 / (rows * p), at most 1 / uniform.

    Args:
        table: of the rows to draw from; whoever trains on them enters their scores.
        uniform: share of draws that ignore the scores, in (0, 1].
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, uniform: float = 0.1) -> None:
        if not 0.0 < uniform <= 1.0:
            raise UserError(f"uniform {uniform}: wanted more than 0, or weights are without bound, and at most 1")
        self.table, self.seed, self.uniform = table, seed, uniform
        self.step = 0
        self.first = Shuffle(table.rows, seed)  # the pass over rows that have no score yet

    def draw(self, count: int) -> Drawn:
        """``count`` rows."""
        new = self._unseen(count)
        if len(new) == count:
            return Drawn(new, torch.ones(count))
        index = self._by_score(count - len(new))
        return Drawn(torch.cat((new, index)), torch.cat((torch.ones(len(new)), self.weight(index))))

    def weight(self, index: Tensor) -> Tensor:
        """float32 [n]: 1 / (rows * p) of the rows in ``index``."""
        uniform, total = self._uniform(), self.table.total
        # float64: the mean of 100 million scores over one of them, to the last bit of a float32.
        scores = self.table.scores[index].double().nan_to_num(0.0)
        relative = scores * (self.table.rows / total) if total > 0.0 else scores
        return (1.0 / (relative * (1.0 - uniform) + uniform)).float()

    def _uniform(self) -> float:
        return self.uniform if self.table.total > 0.0 else 1.0

    def _unseen(self, count: int) -> Tensor:
        found: list[Tensor] = []
        while count and len(ahead := self.first.peek()):
            places = self.table.scores[ahead].isnan().nonzero().squeeze(1)[:count]
            found.append(ahead[places])
            count -= len(places)
            self.first.position += int(places[-1]) + 1 if not count else len(ahead)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def _by_score(self, count: int) -> Tensor:
        slot = torch.arange(count)
        point = (slot + uniform_double(slot, seed=self.seed, step=self.step + _IMPORTANCE)) / count
        self.step += 1
        uniform = self._uniform()
        split = int((point < uniform).sum())  # points ascend
        anywhere = (point[:split] / uniform * self.table.rows).long().clamp_(max=self.table.rows - 1)
        return torch.cat((anywhere, self.table.find((point[split:] - uniform) / (1.0 - uniform))))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first": self.first.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.first.position = int(state["step"]), int(state["first"])


class InfoBatch:
    """Drops well-learned rows of an epoch at random, and counts the kept ones of them for the dropped.

    A row whose score is below the mean of the table, as it was when the epoch began, is dropped with
    probability ``prune``, or kept with weight 1 / (1 - prune). Other rows, and rows without a score, are
    kept with weight 1. Training ends on every row; that is up to the caller.
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, prune: float = 0.5) -> None:
        if not 0.0 <= prune < 1.0:
            raise UserError(f"prune {prune}: wanted a probability, at least 0 and below 1")
        self.table, self.seed, self.probability = table, seed, prune
        self.epoch = -1
        self.threshold = 0.0

    def begin(self, epoch: int) -> None:
        """Take the threshold of a new epoch; nothing if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.threshold = epoch, self.table.mean

    def prune(self, index: Tensor, epoch: int) -> Drawn:
        """The rows of ``index`` that are kept, in their order."""
        self.begin(epoch)
        learned = self.table.scores[index] < self.threshold  # false where there is no score
        chance = uniform_double(index, seed=self.seed, step=epoch + _INFOBATCH)
        keep = ~(learned & (chance < self.probability))
        weight = torch.where(learned, 1.0 / (1.0 - self.probability), 1.0)
        return Drawn(index[keep], weight[keep])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.threshold = int(state["epoch"]), float(state["threshold"])


class Shuffle:
    """The rows in a random order that takes no memory: a pass over them, from ``position`` on.

    The row at a place is the place enciphered (a Feistel network on pairs; Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002), so any part of the order can be had at once: ``torch.randperm``
    of 100 million rows takes 800 MB and seconds.
    """

    ROUNDS = 6

    def __init__(self, rows: int, seed: int, epoch: int = 0) -> None:
        self.rows, self.position = rows, 0
        self.left = max(1, round(rows**0.5))
        self.right = -(-rows // self.left)  # left * right is at least rows, by less than left
        keys = uniform_double(torch.arange(self.ROUNDS), seed=seed, step=epoch + _SHUFFLE)
        self.keys: list[int] = (keys * 2.0**32).long().tolist()
        self._block = torch.empty(0, dtype=torch.int64)
        self._begin = 0

    def peek(self) -> Tensor:
        """The next rows, at most a block of them and at least one; empty at the end."""
        if self.position >= self.rows:
            return self._block[:0]
        if not self._begin <= self.position < self._begin + len(self._block):
            self._begin = self.position
            self._block = self.at(torch.arange(self.position, min(self.position + _BLOCK, self.rows)))
        return self._block[self.position - self._begin :]

    def at(self, places: Tensor) -> Tensor:
        """int64: the rows at places in [0, rows)."""
        found = self._encipher(places)
        while (outside := found >= self.rows).any():  # walk on until back inside: still one to one
            found = torch.where(outside, self._encipher(found), found)
        return found

    def _encipher(self, place: Tensor) -> Tensor:
        a, b = place // self.right, place % self.right
        for number, key in enumerate(self.keys):
            if number % 2:
                b = (b + _mix(a, key)) % self.right
            else:
                a = (a + _mix(b, key)) % self.left
        enciphered: Tensor = a * self.right + b
        return enciphered


def _mix(values: Tensor, key: int) -> Tensor:
    """32 bits that all depend on all of the key's and the values' (the finaliser of MurmurHash3)."""
    x = values ^ key
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    mixed: Tensor = x ^ x >> 16
    return mixed
