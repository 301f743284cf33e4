"""How unlike what was seen before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_training.arguments import check_integer
from sparse_training.errors import UserError
from sparse_training.gate.schedules import Weight
from sparse_training.gate.terms.base import MEMORY, Term
from sparse_training.gate.terms.context import Context

CENTROIDS = 4096  # classes at most: more would cost more than the model's own head
PRODUCT = 2**24  # numbers of a matrix product at once, 64 MiB: of more rows, such as pixels, it is made in parts


class Novelty(Term):
    """Distance of a row's embedding to the nearest of what was seen: (1 - largest cosine) / 2, by one matrix product.

    Rows are samples, tokens or pixels, each with an embedding.

    Args:
        weight: as for ``Term``.
        memory: number of embeddings to remember, the latest ones, at least 1; of a larger batch, as many, evenly
            spaced. None (the default) for one running mean of each class's embeddings, which needs class targets, of
            at most 4,096 classes, and no memory that grows.
        embedding: name of the submodule whose output embeds a row, for a trainer. Where rows are samples, tokens and
            pixels are averaged. None (the default) for the input of the model's last linear layer or, where rows are
            tokens or pixels, of its last linear or convolutional one.

    Raises:
        UserError: ``memory`` is out of range; at a batch, an embedding of the wrong dtype, shape or width, or no
            classes.
    """

    needs = ("embedding",)
    seen: Tensor
    position: Tensor

    def __init__(
        self, weight: float | Weight = 1.0, *, memory: int | None = None, embedding: str | None = None
    ) -> None:
        super().__init__(weight)
        self.memory = None if memory is None else check_integer("memory", memory, 1)
        self.embedding, self.per_process = embedding, memory is not None
        self.register_buffer("seen", torch.empty(0, 0))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def _slots(self, context: Context) -> int:
        return context.classes if self.memory is None else self.memory

    def check(self, context: Context) -> None:
        """Check the embedding's dtype and shape."""
        embedding, slots = context.embedding, self._slots(context)
        assert embedding is not None
        if embedding.ndim != 2 or embedding.shape[0] != context.rows or not embedding.is_floating_point():
            raise UserError(
                f"`embedding` must be floating of shape [{context.rows}, width], got {embedding.dtype} of shape "
                f"{list(embedding.shape)}"
            )
        if not slots:
            raise UserError("the term Novelty needs class targets for its centroids; use Novelty(memory=1000)")
        if self.memory is None and slots > CENTROIDS:
            raise UserError(
                f"the term Novelty keeps centroids of at most {CENTROIDS} classes, got {slots}; use "
                "Novelty(memory=1000), as the significance language does"
            )
        if self.seen.numel() and self.seen.shape != (slots, embedding.shape[1]):
            raise UserError(
                f"`embedding` must have width {self.seen.shape[1]} and {self.seen.shape[0]} classes, as the batches "
                f"before it, got width {embedding.shape[1]} and {slots}"
            )

    def forward(self, context: Context) -> Tensor:
        """Compute the distances, then take the batch into the centroids or the memory."""
        embedding = context.embedding
        assert embedding is not None
        if not self.seen.numel():
            self.resize("seen", self._slots(context), embedding.shape[1], device=embedding.device)
        unit = F.normalize(embedding.float(), dim=1)
        known = (self.seen != 0).any(1)
        seen = F.normalize(self.seen, dim=1).T
        nearest = [
            (part @ seen).masked_fill(~known, -1.0).amax(1)  # as far as can be from nothing
            for part in torch.split(unit, max(1, PRODUCT // seen.shape[1]))
        ]
        finite = unit.isfinite().all(1)
        distance = torch.where(finite, 0.5 * (1.0 - torch.cat(nearest)), torch.nan)
        valid = context.valid & finite
        unit = torch.where(valid[:, None], unit, 0.0)
        if self.memory is None:
            self._learn_centroids(unit, context, valid)
        else:
            self._remember(unit, valid)
        return distance

    def _learn_centroids(self, unit: Tensor, context: Context, valid: Tensor) -> None:
        labels = torch.where(valid, context.targets, 0).long()
        counted = torch.cat((unit, valid[:, None].float()), 1)  # zeros for rows that do not count
        classes = self.seen.shape[0]
        sums, size = counted.new_zeros(classes, counted.shape[1]), max(1, PRODUCT // classes)
        for start in range(0, len(labels), size):
            sums += F.one_hot(labels[start : start + size], classes).float().T @ counted[start : start + size]
        sums = context.total(sums)
        count = sums[:, -1:]
        mean = sums[:, :-1] / count.clamp(min=1.0)
        keep = torch.where((self.seen != 0).any(1, keepdim=True), MEMORY, 0.0) ** count.clamp(max=1.0)
        self.seen.copy_(torch.where(count > 0, keep * self.seen + (1.0 - keep) * mean, self.seen))

    def _remember(self, unit: Tensor, valid: Tensor) -> None:
        """Overwrite the oldest embeddings; rows that do not count are written to no slot."""
        slots, count = self.seen.shape[0], valid.sum()
        taken = count.clamp(max=slots)
        before = (valid.cumsum(0) - 1).clamp(min=0) * taken
        spaced = before // count.clamp(min=1)  # of a batch larger than the memory: its last rows may be one text
        chosen = valid & ((before + taken) // count.clamp(min=1) > spaced)
        place = torch.where(chosen, (self.position + spaced) % slots, slots)
        grown = torch.cat((self.seen, self.seen.new_zeros(1, self.seen.shape[1])))
        self.seen.copy_(grown.index_copy(0, place, unit)[:slots])
        self.position.add_(taken)

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return f"{super().extra_repr()}, memory={self.memory}, embedding={self.embedding}"
