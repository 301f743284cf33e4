"""What loaders, policies, scorers, samplers and the trainer hand to one another.

Nothing of this package is imported here: these types lie below all that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LossFunction = Callable[[Any, Any], Tensor]  # logits, targets -> one loss a row, [B]


class CandidateIndices(NamedTuple):
    """The rows of a loader's item, before they are loaded, for a policy to choose from.

    Attributes:
        ids: int64 [B], on the CPU: row numbers in the data set; of a stream, positions in the batch.
        epoch: the epoch that the item belongs to, from 0.
    """

    ids: Tensor
    epoch: int


class WeightedIndices(NamedTuple):
    """Rows to load or to train on, with their importance weights.

    Attributes:
        index: int64 [n]: row numbers, or positions in the batch that was scored.
        weight: float32 [n]: the factor of each row's loss, 1/p for a row kept with probability p; None for 1.
    """

    index: Tensor  # type: ignore[assignment]  # shadows a tuple's method that nobody calls here
    weight: Tensor | None = None

    def weights(self) -> Tensor:
        """Importance weights as a tensor, ones where there are none: float32 [n]."""
        return torch.ones(len(self.index), device=self.index.device) if self.weight is None else self.weight


class Batch(NamedTuple):
    """One batch on the training device; dim 0 of every tensor counts its rows.

    Attributes:
        inputs: a tensor, or a tuple or mapping of tensors.
        targets: tensor [B, ...].
        ids: int64 [B], row numbers in the data set; None where the loader does not know them.
        offered: number of rows before the policy chose which to load.
        weight: float32 [B], importance weights of the rows; 0 for rows that do not count. None for 1.
        counted: number of rows that count, where that is not all of them.
    """

    inputs: Any
    targets: Tensor
    ids: Tensor | None
    offered: int
    weight: Tensor | None = None
    counted: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.targets.shape[0]

    @property
    def divisor(self) -> int | Tensor:
        """Number that a sum over the counting rows is divided by, at least 1."""
        return self.rows if self.counted is None else self.counted.clamp(min=1)


class SelectedBatch(NamedTuple):
    """The rows to train on. The loss is their mean, or with ``weight`` sum(weight * loss) / divisor.

    Attributes:
        inputs: the selected rows of the batch's inputs.
        targets: the selected rows of the batch's targets.
        rows: number of rows; a device tensor where padding hides the number from the host.
        positions: int64 [n], positions in the batch; None for all of it.
        weight: float32 [n], importance weights, 0 on padding; None for 1.
        divisor: number that the weighted sum of losses is divided by.
    """

    inputs: Any
    targets: Tensor
    rows: int | Tensor
    positions: Tensor | None = None
    weight: Tensor | None = None
    divisor: int | Tensor = 1


class Scores:
    """What a scorer says of a batch's rows.

    Attributes:
        targets: [B, ...], the batch's; None before the batch is loaded.
        criterion: maps logits and targets to one loss a row.
        logits: the scorer's, without gradient, as ``criterion`` takes them; None where it has losses alone.
        offset: float32 [B], added to each row's loss; None for 0.
    """

    def __init__(
        self,
        targets: Tensor | None,
        criterion: LossFunction,
        *,
        logits: Any = None,
        losses: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.targets, self.logits, self.offset = targets, logits, offset
        self.criterion, self._losses = criterion, losses

    @property
    def losses(self) -> Tensor:
        """Loss of each row, with the offset: float32 [B]."""
        if self._losses is None:
            with torch.no_grad():
                logits = self.logits.float() if isinstance(self.logits, Tensor) else self.logits
                self._losses = self.criterion(logits, self.targets).float()
        return self._losses if self.offset is None else self._losses + self.offset
