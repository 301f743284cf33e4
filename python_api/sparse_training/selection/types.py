"""Types that loaders, policies, scorers, samplers and the trainer hand to one another.

Nothing of this package is imported here: these types lie below all that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LossFunction = Callable[[Any, Any], Tensor]  # logits, targets -> one loss per row, [B]


class CandidateIndices(NamedTuple):
    """Rows that a loader offers before it loads them, for a policy to choose from.

    Attributes:
        ids: int64 [B], on the CPU: row numbers in the data set; for a stream, positions in the batch.
        epoch: number of the epoch, from 0.
        places: int64 [B], numbers that draws may depend on, each offered once in an epoch; None where ``ids`` are such.
        together: True where rows make a batch with these others only, as a batch sampler of the user's arranged them.
    """

    ids: Tensor
    epoch: int
    places: Tensor | None = None
    together: bool = False


class WeightedIndices(NamedTuple):
    """Rows to load or to train on, with their importance weights.

    Attributes:
        index: int64 [n]: row numbers, or positions in the batch that was scored.
        weight: float32 [n]: the factor of each row's loss, 1/p for a row kept with probability p; None for 1.
    """

    index: Tensor  # type: ignore[assignment]  # shadows a tuple's method that nobody calls here
    weight: Tensor | None = None

    def weights(self) -> Tensor:
        """Importance weights as a tensor, float32 [n]: ones where ``weight`` is None."""
        return torch.ones(len(self.index), device=self.index.device) if self.weight is None else self.weight


class Batch(NamedTuple):
    """One batch on the training device; dim 0 of every tensor indexes its rows.

    Attributes:
        inputs: a tensor, or a tuple or mapping of tensors.
        targets: tensor [B, ...].
        ids: int64 [B], row numbers in the data set; None where the loader does not know them.
        offered: number of rows before the policy chose which to load.
        weight: float32 [B], importance weights (1/p) of the rows; 0 for rows that do not count. None for 1.
        counted: number of rows that count, an integer tensor of one element; None for all of them.
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
        """Number to divide a sum over the rows that count by, at least 1."""
        return self.rows if self.counted is None else self.counted.clamp(min=1)


class SelectedBatch(NamedTuple):
    """Rows to train on. The loss is their mean or, with ``weight``, sum(weight * loss) / divisor.

    Attributes:
        inputs: the selected rows of the batch's inputs.
        targets: the selected rows of the batch's targets.
        rows: number of rows; a device tensor where padding hides the number from the host.
        positions: int64 [n], positions in the batch; None for all of it.
        weight: float32 [n], importance weights, 0 on padding; None for 1.
        divisor: number to divide the weighted sum of losses by.
    """

    inputs: Any
    targets: Tensor
    rows: int | Tensor
    positions: Tensor | None = None
    weight: Tensor | None = None
    divisor: int | Tensor = 1


class Scores:
    """A scorer's output for the rows of a batch: logits or losses.

    Args:
        targets: targets of the batch, [B, ...]; None before the batch is loaded.
        criterion: maps logits and targets to one loss per row.
        logits: the scorer's logits, without gradient, as ``criterion`` takes them; None (the default) where it gives
            losses alone.
        losses: the scorer's losses, float32 [B]; None (the default) to compute them from the logits when needed.
        offset: number added to each row's loss, float32 [B]; None (the default) for 0.

    Attributes:
        targets: as given.
        criterion: as given.
        logits: as given.
        offset: as given; a scorer may set it later.
        embedding: embeddings of the rows, float [B, width]; None where no one asked for them.
        inputs: inputs of the samples, where the rows are their tokens or pixels; None for those of the batch.
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
        self.embedding: Tensor | None = None
        self.inputs: Any = None
        self.criterion, self._losses = criterion, losses

    @property
    def losses(self) -> Tensor:
        """Losses of the rows, offset included: float32 [B]."""
        if self._losses is None:
            with torch.no_grad():
                logits = self.logits.float() if isinstance(self.logits, Tensor) else self.logits
                self._losses = self.criterion(logits, self.targets).float()
        return self._losses if self.offset is None else self._losses + self.offset
