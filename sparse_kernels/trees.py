"""Nested structures of rows: opened, so that their tensors and arrays can be moved, and put together again.

Opened are whatever ``torch.utils._pytree`` knows, mappings, sequences, and dataclasses. Their leaves are tensors and
NumPy arrays, which hold rows, and what holds none: None, a number, a text, and other objects without length or shape.
Whatever else might hold rows is refused: nothing passes through with rows that were not selected.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels._operands import check_device, kind

_is_leaf: Callable[[Any], bool] = getattr(pytree, "tree_is_leaf", None) or pytree._is_leaf  # its name before 2.9

Rebuild = Callable[[Iterator[Any]], Any]
_VALUES = (type(None), bool, int, float, complex, str, bytes, np.generic)  # one each: a text is a name


class Tree:
    """Tensors and NumPy arrays of a nested structure, and the way back to it.

    Args:
        tree: the structure.
        rows: what each of them has in dim 0.
        device: of the tensors.

    Raises:
        TypeError: a part might hold rows and is not known.
        ValueError: a tensor or an array has another number of rows, or a tensor is on another device.
    """

    __slots__ = ("_rebuild", "arrays", "leaves", "tensors", "tree")

    def __init__(self, tree: Any, rows: int, device: torch.device) -> None:
        self.tree = tree
        self.arrays: list[np.ndarray[Any, Any]] = []
        self._rebuild: Rebuild | None = None  # None: the tree has one level
        tensors = _tensors_of_one_level(tree)
        if tensors is None:
            self.leaves: list[Any] = []
            self._rebuild = _open_tensors(tree, self.leaves) or _open(tree, "tree", rows, self.leaves)
            if not self.leaves and not _is_container(tree):
                raise TypeError(f"`tree` must be a tensor, an array or a structure of them, got {kind(tree)}")
            self.arrays = [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]
            tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.tensors = tensors
        self._check(rows, device)

    def _check(self, rows: int, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        for tensor in self.tensors:
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise ValueError(
                    f"every tensor of `tree` must have {rows} rows in dim 0, got one of shape {tuple(tensor.shape)}"
                )
            if not (on_cpu and tensor.is_cpu):
                check_device("tree", tensor, "the selection", device)
        for array in self.arrays:
            if array.ndim == 0 or array.shape[0] != rows:
                raise ValueError(
                    f"every array of `tree` must have {rows} rows in dim 0, got one of shape {array.shape}"
                )

    def rebuild(self, tensors: list[Tensor], array: Callable[[Any], Any] | None = None) -> Any:
        """Return the tree with its tensors and arrays replaced; what holds no rows stays.

        Args:
            tensors: one for each of ``tensors``.
            array: makes the replacement of an array; None where there is none.
        """
        if self._rebuild is None:
            cls = type(self.tree)
            if cls is dict:
                return dict(zip(self.tree, tensors, strict=True))
            return tensors[0] if isinstance(self.tree, Tensor) else cls(tensors)
        moved = iter(tensors)
        if array is None:
            return self._rebuild(moved)
        return self._rebuild(iter([next(moved) if isinstance(leaf, Tensor) else array(leaf) for leaf in self.leaves]))


def map_rows(tree: Any, function: Callable[[Any], Any], rows: int | None = None) -> Any:
    """Return the tree with each of its tensors and arrays replaced by a function's result.

    Args:
        tree: the structure.
        function: takes a tensor or a NumPy array.
        rows: a list with as many numbers or texts is refused, since it holds rows, too. Default: none is.

    Raises:
        TypeError: a part might hold rows and is not known.
    """
    leaves: list[Any] = []
    rebuild = _open(tree, "tree", rows, leaves)
    return rebuild(iter([function(leaf) for leaf in leaves]))


def rows_at(tree: Any, index: Tensor, rows: int) -> Any:
    """Return the tree with the rows at these places; a plain index_select, which autograd follows.

    Args:
        tree: the structure.
        index: int64 [n].
        rows: what each tensor and array has in dim 0.

    Raises:
        TypeError: a part might hold rows and is not known.
        ValueError: a tensor or an array has another number of rows.
    """

    def selected(part: Any) -> Any:
        if part.ndim == 0 or part.shape[0] != rows:
            raise ValueError(f"every tensor must have {rows} rows in dim 0, got one of shape {tuple(part.shape)}")
        if isinstance(part, Tensor):
            return part.index_select(0, index.to(part.device))
        return part[index.cpu().numpy()]

    return map_rows(tree, selected, rows)


def _tensors_of_one_level(tree: Any) -> list[Tensor] | None:
    """Return the tensors of a tensor, or of a plain tuple, list or dict of nothing else; None for any other tree.

    Most batches are one of these, and the general flatten takes longer than a small gather.
    """
    if isinstance(tree, Tensor):
        return [tree]
    cls = type(tree)
    if cls is tuple or cls is list:
        leaves = list(tree)
    elif cls is dict:
        leaves = list(tree.values())
    else:
        return None
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            return None
    return leaves


def _open_tensors(tree: Any, leaves: list[Any]) -> Rebuild | None:
    """Open a nested structure of nothing but tensors, as pytree does; None for any other."""
    found, spec = pytree.tree_flatten(tree)
    for leaf in found:
        if not isinstance(leaf, Tensor):
            return None
    leaves += found
    return lambda moved: pytree.tree_unflatten(list(moved), spec)


def _is_container(tree: Any) -> bool:
    if isinstance(tree, _VALUES):
        return False
    return _is_node(tree) or isinstance(tree, (Mapping, Sequence)) or _is_dataclass(tree)


def _is_node(tree: Any) -> bool:
    return not _is_leaf(tree)


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _open(tree: Any, name: str, rows: int | None, leaves: list[Any]) -> Rebuild:
    """Append the tensors and arrays of a tree to ``leaves``; return what rebuilds it from as many others, in order.

    Args:
        tree: the structure.
        name: of it, for messages.
        rows: that a tensor would have; None where that is not known.
        leaves: appended to.
    """
    if isinstance(tree, (Tensor, np.ndarray)):
        leaves.append(tree)
        return next
    if isinstance(tree, _VALUES):
        return lambda _: tree
    before = len(leaves)
    if _is_node(tree):
        children, spec = pytree.tree_flatten(tree, is_leaf=lambda node: node is not tree)
        parts = _open_all(tree, children, name, rows, leaves)
        return lambda moved: pytree.tree_unflatten([part(moved) for part in parts], spec)
    if isinstance(tree, Mapping):
        values = dict(tree.items())
        parts = _open_all(values, values.values(), name, rows, leaves)
        if len(leaves) == before:  # nothing to select
            return lambda _: tree
        return lambda moved: _mapping(tree, {key: part(moved) for key, part in zip(values, parts, strict=True)}, name)
    if _is_dataclass(tree):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        parts = [_open(value, f"{name}.{key}", rows, leaves) for key, value in fields.items()]
        if len(leaves) == before:
            return lambda _: tree
        return lambda moved: _dataclass(tree, {key: part(moved) for key, part in zip(fields, parts, strict=True)}, name)
    if isinstance(tree, Sequence) and not isinstance(tree, (bytearray, memoryview)):
        parts = _open_all(tree, tree, name, rows, leaves)
        if len(leaves) == before:
            return lambda _: tree
        return lambda moved: _sequence(tree, [part(moved) for part in parts], name)
    if _might_hold_rows(tree):
        raise TypeError(
            f"`{name}` might hold rows and cannot be selected: got {kind(tree)}; make it a tensor or a NumPy array, "
            "or leave it out"
        )
    return lambda _: tree


def _open_all(tree: Any, children: Iterable[Any], name: str, rows: int | None, leaves: list[Any]) -> list[Rebuild]:
    children = list(children)
    if isinstance(tree, dict):
        names = [f"{name}[{key!r}]" for key in tree] if len(tree) == len(children) else [name] * len(children)
    else:
        names = [f"{name}[{i}]" for i in range(len(children))]
        if children and len(children) == rows and not _is_size(tree) and _are_values(children):
            raise TypeError(
                f"`{name}` holds a value for each of {rows} rows and cannot be selected: got {kind(tree)}; "
                "make it a tensor or a NumPy array"
            )
    return [_open(child, part, rows, leaves) for child, part in zip(children, names, strict=True)]


def _are_values(children: list[Any]) -> bool:
    return all(isinstance(child, _VALUES) for child in children)


def _is_size(tree: Any) -> bool:
    """Return True for a few whole numbers in a tuple: height and width, not values of rows."""
    return isinstance(tree, tuple) and len(tree) <= 4 and all(isinstance(value, int) for value in tree)


def _might_hold_rows(leaf: Any) -> bool:
    """Return True for an object with a length, a shape or items, or with a tensor or an array among its attributes."""
    if isinstance(leaf, type):
        return False
    if hasattr(leaf, "__len__") or hasattr(leaf, "__iter__") or hasattr(leaf, "shape"):
        return True
    return any(isinstance(value, (Tensor, np.ndarray)) for value in getattr(leaf, "__dict__", {}).values())


def _mapping(tree: Any, values: dict[Any, Any], name: str) -> Any:
    """Make a mapping of the tree's type. Made anew: a copy would keep what it holds besides, of rows left out."""
    made = _attempt(lambda: type(tree)(values), values) or _attempt(lambda: _updated(tree, values), values)
    if type(made) is not type(tree):
        raise TypeError(f"`{name}` cannot be made anew from a dict: got {kind(tree)}")
    return made


def _attempt(make: Callable[[], Any], values: dict[Any, Any]) -> Any:
    """Return what ``make`` makes if it holds these values and no others, else None."""
    try:
        made = make()
        return made if len(made) == len(values) and all(made[key] is value for key, value in values.items()) else None
    except Exception:  # whatever a constructor of the caller's raises
        return None


def _updated(tree: Any, values: dict[Any, Any]) -> Any:
    made = copy.copy(tree)
    for key, value in values.items():
        made[key] = value
    return made


def _dataclass(tree: Any, values: dict[str, Any], name: str) -> Any:
    of_init = {field.name for field in dataclasses.fields(tree) if field.init}
    try:
        made = dataclasses.replace(tree, **{key: value for key, value in values.items() if key in of_init})
    except Exception as error:
        raise TypeError(f"`{name}` cannot be made anew from its fields: got {kind(tree)}; {error}") from error
    for key, value in values.items():
        object.__setattr__(made, key, value)
    return made


def _sequence(tree: Any, values: list[Any], name: str) -> Any:
    try:
        made = type(tree)(values)
        if len(made) == len(values) and all(a is b for a, b in zip(made, values, strict=True)):
            return made
    except Exception as error:
        raise TypeError(f"`{name}` cannot be made anew from a list: got {kind(tree)}; {error}") from error
    raise TypeError(f"`{name}` cannot be made anew from a list: got {kind(tree)}")
