"""Running statistics of a model's normalisation, which a batch that is not learned from must not change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SavedStatistics:
    """Running statistics as they are before a batch.

    Args:
        norms: normalisation layers; those in training mode, which the batch will change, are saved.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        changing = [buffer for module in norms if module.training for buffer in module.buffers(recurse=False)]
        # Integers, which no NaN gets into: a factor of 0 or 1 selects bit for bit, in few launches.
        self._saved = [(live, live.clone()) for live in map(_as_integers, changing)]

    @torch.no_grad()
    def restore_where(self, invalid: Tensor | None) -> None:
        """Undo what the batch did, if it is invalid; waits for no device.

        Args:
            invalid: bool, one element; None where the host knows that the batch is valid.
        """
        if invalid is None or not self._saved:
            return
        if invalid.device.type == "xla":
            for live, before in self._saved:
                live.copy_(torch.where(invalid, before, live))
            return
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for live, before in self._saved:
            lives, befores = by_dtype.setdefault(live.dtype, ([], []))
            lives.append(live)
            befores.append(before)
        for dtype, (lives, befores) in by_dtype.items():
            torch._foreach_mul_(lives, (~invalid).to(dtype))
            torch._foreach_mul_(befores, invalid.to(dtype))
            torch._foreach_add_(lives, befores)


def _as_integers(buffer: Tensor) -> Tensor:
    """View a tensor as integers of the same size; on XLA, which has no such views, as it is."""
    if not buffer.is_floating_point() or buffer.device.type == "xla":
        return buffer
    return buffer.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.element_size()])
