"""Checked calls that move rows: ``gather_rows`` and ``scatter_rows``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_kernels._operands import vetted_places
from sparse_kernels._tracing import values_readable
from sparse_kernels.trees import Tree
from sparse_kernels.types import Selection


class TreeCall(Tree):
    """A checked ``gather_rows`` or ``scatter_rows`` call.

    Args:
        tree: nested structure of tensors and NumPy arrays.
        selection: the rows; its weight and overflow take no part.
        rows: what every tensor and array of the tree has in dim 0.
        scatter: whether the tree's rows are the selection's slots. Default: they are the batch's.
    """

    __slots__ = ("scatter", "selection")
    known = None  # a call like this one is checked anew

    def __init__(self, tree: Any, selection: Selection, rows: int, *, scatter: bool = False) -> None:
        index, count, _ = vetted_places(selection.index, selection.count, selection.size)
        if index is not selection.index or count is not selection.count:
            selection = selection._replace(index=index, count=count)
        self.selection, self.scatter = selection, scatter
        Tree.__init__(self, tree, rows, index.device)
        if scatter and values_readable(count) and not 0 <= (kept := int(count)) <= index.shape[0]:
            raise ValueError(f"selection count {kept} does not fit its {index.shape[0]} slots")

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        return [self.selection.index, self.selection.count, *self.tensors]

    @property
    def device(self) -> torch.device:
        return self.selection.index.device

    def check_index(self) -> None:
        """Raise for an index out of range, where the host may look: for what does not look by itself."""
        selection = self.selection
        if not values_readable(selection.index) or (selection.size == 0 and not self.scatter):  # nothing is read
            return
        index = selection.index[: int(selection.count)] if self.scatter else selection.index
        bad = ((index < 0) | (index >= selection.size)).nonzero()
        if len(bad):
            slot = int(bad[0])
            raise ValueError(f"selection index {int(index[slot])} in slot {slot} is outside {selection.size} rows")

    def rebuild(self, tensors: list[Tensor], array: Callable[[Any], Any] | None = None) -> Any:
        """Return the tree with its tensors replaced, in order, and the rows of its arrays moved."""
        if self.arrays:
            self.check_index()
            array = self._moved
        return Tree.rebuild(self, tensors, array)

    def _moved(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        selection = self.selection
        index = selection.index.cpu().numpy()
        if self.scatter:
            kept = int(selection.count)
            out = np.zeros((selection.size, *array.shape[1:]), array.dtype)
            out[index[:kept]] = array[:kept]
            return out
        if selection.size == 0:  # nothing to read, not even for padding
            return np.zeros((len(index), *array.shape[1:]), array.dtype)
        rows: np.ndarray[Any, Any] = array[index]
        return rows
