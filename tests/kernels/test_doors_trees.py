"""Rows are never returned unselected: every structure is opened and made anew, or refused by name."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.trees import map_rows, rows_at
from sparse_training.nn import Compact, Expand

BACKENDS = ["torch"] + ([] if cpp_backend.unavailable_reason() else ["cpp"])
MASK = torch.tensor([False, True, False, False, True, False])
KEPT = [1, 4]


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Any
    note: str = "a name"
    width: Any = dataclasses.field(default=None, init=False)


@dataclasses.dataclass
class Slotted:
    x: Any

    __slots__ = ("x",)


class Point(NamedTuple):
    x: Any
    y: Any


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: it holds more than its items, of every row."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self.encodings = encodings


class OwnDict(dict):
    """A dict with a constructor of its own."""

    def __init__(self, x=None, **others):
        super().__init__(**others)
        if x is not None:
            self["x"] = x


class OwnList(list):
    pass


CONTAINERS = {
    "dict": lambda x: {"x": x},
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "named tuple": lambda x: Point(x, x),
    "ordered dict": lambda x: collections.OrderedDict(x=x),
    "default dict": lambda x: collections.defaultdict(list, x=x),
    "deque": lambda x: collections.deque([x]),
    "user dict": lambda x: collections.UserDict(x=x),
    "user list": lambda x: collections.UserList([x]),
    "encoding": lambda x: Encoding({"x": x}),
    "own dict": lambda x: OwnDict(x),
    "own list": lambda x: OwnList([x]),
    "proxy": lambda x: types.MappingProxyType({"x": x}),
    "chain": lambda x: collections.ChainMap({"x": x}),
    "data class": Sample,
    "slots": Slotted,
    "beside values": lambda x: {"x": x, "none": None, "number": 3, "name": "a batch", "flag": True, "size": (2, 3)},
}


def leaves(tree):
    """The tensors and arrays of a tree, found by nothing of ours."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return [tree]
    if isinstance(tree, (str, bytes)) or tree is None:
        return []
    if dataclasses.is_dataclass(tree):
        return [leaf for field in dataclasses.fields(tree) for leaf in leaves(getattr(tree, field.name))]
    if hasattr(tree, "values"):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [leaf for value in tree for leaf in leaves(value)] if hasattr(tree, "__iter__") else []


def check(packed, tree, expected):
    """Of the same type all the way, every leaf selected."""
    assert type(packed) is type(tree)
    found = leaves(packed)
    assert len(found) == len(leaves(tree)) > 0
    for leaf in found:
        assert np.asarray(leaf).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("array", [False, True], ids=["tensor", "array"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_opened(name, array, backend):
    rows = np.arange(6.0) if array else torch.arange(6.0)
    tree = CONTAINERS[name](rows)
    selection = sk.compact(MASK)
    check(sk.gather_rows(tree, selection, backend=backend), tree, [1.0, 4.0])
    packed = CONTAINERS[name](rows[KEPT])
    check(sk.scatter_rows(packed, selection, backend=backend), tree, [0.0, 1.0, 0.0, 0.0, 4.0, 0.0])
    check(selection.take(tree), tree, [1.0, 4.0])
    check(rows_at(tree, torch.tensor(KEPT), 6), tree, [1.0, 4.0])
    assert np.asarray(leaves(tree)[0]).tolist() == list(range(6))  # the caller's stays


@pytest.mark.parametrize("name", CONTAINERS)
def test_layers_and_select_open_every_container(name):
    tree = CONTAINERS[name](torch.arange(6.0))
    packed, selection = Compact()(tree, MASK)
    check(packed, tree, [1.0, 4.0])
    check(Expand()(packed, selection), tree, [0.0, 1.0, 0.0, 0.0, 4.0, 0.0])
    padded, selection = Compact(3)(tree, MASK)
    check(padded, tree, [1.0, 4.0, 1.0])
    nothing, _ = Compact(3)(tree, torch.zeros(6, dtype=torch.bool))
    check(nothing, tree, [0.0, 0.0, 0.0])
    logits, targets = torch.where(MASK[:, None], 0.0, 100.0) * torch.eye(6), torch.arange(6)
    selected = sk.select(logits, targets, torch.tensor(1.0), weights={"loss": 1.0}, tree=tree)
    check(selected.packed, tree, [1.0, 4.0])


def test_what_a_container_holds_besides_is_not_of_rows_left_out():
    packed = sk.compact(MASK).take(Encoding({"x": torch.arange(6)}, encodings=["one of six"] * 6))
    assert packed["x"].tolist() == KEPT
    assert packed.encodings is None
    sample = Sample(torch.arange(6.0))
    object.__setattr__(sample, "width", torch.arange(6.0))
    assert sk.compact(MASK).take(sample).width.tolist() == [1.0, 4.0]


def test_arrays_of_every_dtype_are_selected():
    selection = sk.compact(MASK)
    for array in (
        np.arange(6, dtype=np.uint16), np.arange(12.0).reshape(6, 2), np.array(list("abcdef")),
        np.array([{"a": i} for i in range(6)], dtype=object), np.arange(6) > 2, np.arange(6).astype("datetime64[D]"),
    ):  # fmt: skip
        packed = selection.take({"a": array, "t": torch.arange(6)})["a"]
        assert packed.dtype == array.dtype
        assert packed.tolist() == array[KEPT].tolist()
        placed = sk.scatter_rows([packed], selection)[0]
        assert placed[KEPT].tolist() == array[KEPT].tolist()
    assert sk.compact(MASK[:0], capacity=2).take(np.zeros((0, 3))).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="every array of `tree` must have 6 rows in dim 0, got one of shape"):
        selection.take([np.arange(5)])


class Table:
    """As a data frame: a shape, and nothing that we know."""

    shape = (6, 2)


class Sized:
    def __len__(self):
        return 6


REFUSED = {
    "a data frame": (Table(), "`tree['x']` might hold rows"),
    "an object with a length": (Sized(), "`tree['x']` might hold rows"),
    "a set": ({1, 2}, "`tree['x']` might hold rows"),
    "a generator": ((i for i in range(6)), "`tree['x']` might hold rows"),
    "bytes that change": (bytearray(6), "`tree['x']` might hold rows"),
    "a namespace": (types.SimpleNamespace(x=torch.arange(6)), "`tree['x']` might hold rows"),
    "numbers of rows": ([1, 2, 3, 4, 5, 6], "`tree['x']` holds a value for each of 6 rows"),
    "texts of rows": (list("abcdef"), "`tree['x']` holds a value for each of 6 rows"),
    "a range": (range(6), "`tree['x']` holds a value for each of 6 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_might_hold_rows_is_refused_by_name(name):
    part, message = REFUSED[name]
    selection = sk.compact(MASK)
    rows = torch.arange(6.0)
    for call in (
        lambda: selection.take({"t": rows, "x": part}),
        lambda: sk.scatter_rows({"t": rows[:2], "x": part}, selection._replace(size=6)),
        lambda: Compact(3)({"t": rows, "x": part}, MASK),
    ):
        if name in ("numbers of rows", "texts of rows", "a range") and "scatter" in str(call.__code__.co_names):
            continue  # as many values as rows, not as slots
        with pytest.raises(TypeError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_tree_without_rows_says_so():
    selection = sk.compact(MASK)
    for nothing in (None, 3, "x", object(), Tensor):
        for call in (selection.take, lambda tree: sk.gather_rows(tree, selection), lambda t: Compact()(t, MASK)):
            with pytest.raises(TypeError, match="`tree` must be a tensor, an array or a structure of them, got "):
                call(nothing)
    assert selection.take({}) == {}
    assert selection.take((None, 3, "x")) == (None, 3, "x")
    with pytest.raises(ValueError, match="every tensor of `tree` must have 6 rows in dim 0"):
        selection.take(torch.tensor(1.0))


def test_a_gradient_flows_through_an_opened_tree():
    rows = torch.arange(6.0, requires_grad=True)
    selection = sk.compact(MASK, capacity=3)
    packed = selection.take(collections.UserDict(x=[rows, Sample(rows)]))
    (packed["x"][0].sum() + packed["x"][1].x.square().sum()).backward()
    assert rows.grad.tolist() == [0.0, 3.0, 0.0, 0.0, 9.0, 0.0]


def test_expand_with_a_skip_takes_a_tensor():
    packed, selection = Compact()({"x": torch.arange(6.0)}, MASK)
    with pytest.raises(TypeError, match="`rows` must be a tensor where there is a `skip`, got dict"):
        Expand()(packed, selection, skip=torch.zeros(6))
    with pytest.raises(TypeError, match="`skip` must be a tensor where there is a `skip`, got dict"):
        Expand()(packed["x"], selection, skip={"x": torch.zeros(6)})


TREES = st.recursive(
    st.sampled_from(["tensor", "array", "none", "number"]),
    lambda inner: st.tuples(st.sampled_from(sorted(set(CONTAINERS) - {"beside values"})), inner),
    max_leaves=6,
)


def built(plan, of):
    if isinstance(plan, str):
        rows = of(torch.arange(6.0))
        return {"tensor": rows, "array": rows.numpy(), "none": None, "number": 7}[plan]
    return CONTAINERS[plan[0]](built(plan[1], of))


@settings(max_examples=150, deadline=None)
@given(plan=TREES, backend=st.sampled_from([None, *BACKENDS]))
def test_a_tree_of_any_nesting_comes_back_selected(plan, backend):
    selection = sk.compact(MASK)
    tree = built(plan, lambda rows: rows)
    if plan in ("none", "number"):
        with pytest.raises(TypeError, match="`tree` must be a tensor"):
            sk.gather_rows(tree, selection, backend=backend)
        return
    packed = sk.gather_rows(tree, selection, backend=backend)
    wanted = leaves(built(plan, lambda rows: rows[MASK]))
    assert type(packed) is type(tree)
    assert [np.asarray(a).tolist() for a in leaves(packed)] == [np.asarray(a).tolist() for a in wanted]
    doubled = map_rows(tree, lambda rows: rows * 2)
    assert [np.asarray(a).sum() for a in leaves(doubled)] == [np.asarray(a).sum() * 2 for a in leaves(tree)]
