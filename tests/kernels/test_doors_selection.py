"""A selection made by hand reads and writes nothing but the tensors given: it is checked, whoever made it."""

import mmap
import os

import fresh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend

BACKENDS = ["torch"] + ([] if cpp_backend.unavailable_reason() else ["cpp"])
MASK = torch.tensor([False, True, False, False, True, False])
MOVES = {"gather": sk.gather_rows, "scatter": sk.scatter_rows}


def rows_for(move, selection):
    return torch.arange(6.0) if move == "gather" else torch.arange(1.0, 1.0 + selection.index.shape[0])


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("move", MOVES)
def test_an_int32_index_is_taken_for_what_it_says(move, backend):
    selection = sk.compact(MASK, capacity=4)
    by_hand = selection._replace(index=selection.index.int(), count=selection.count.long())
    rows = rows_for(move, selection)
    assert torch.equal(MOVES[move](rows, by_hand, backend=backend), MOVES[move](rows, selection, backend=backend))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="reads past the end of a page: of the compiled kernels alone")
@pytest.mark.parametrize("move", MOVES)
def test_an_int32_index_at_the_end_of_a_page_is_not_read_beyond_it(move):
    code = f"""
import ctypes, mmap, numpy as np, torch, sparse_kernels as sk
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
index = torch.from_numpy(np.frombuffer(memory, dtype=np.int32, count=page // 4))
index.copy_(torch.arange(page // 4))
selection = sk.compact(torch.ones(page // 4).bool())._replace(index=index)
out = sk.{move}_rows(torch.arange(float(page // 4)), selection, backend="cpp")
assert torch.equal(out, torch.arange(float(page // 4)))
import os; os._exit(0)
"""
    done = fresh.run("-c", code)
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-500:]}"
    assert mmap.PAGESIZE % 4 == 0


WRONG = {
    "a 2-D index": (lambda s: {"index": s.index[None]}, ValueError, "`selection.index` must have shape"),
    "a float index": (lambda s: {"index": s.index.double()}, TypeError, "`selection.index` must be an int64 tensor"),
    "a bool index": (lambda s: {"index": MASK}, TypeError, "`selection.index` must be an int64 tensor"),
    "a list": (lambda s: {"index": s.index.tolist()}, TypeError, "`selection.index` must be an int64 tensor, got list"),
    "a long weight": (lambda s: {"weight": torch.ones(7)}, ValueError, "`selection.weight` must have shape"),
    "a double weight": (lambda s: {"weight": s.weight.double()}, TypeError, "`selection.weight` must be a float32"),
    "no weight": (lambda s: {"weight": None}, TypeError, "`selection.weight` must be a float32 tensor, got NoneType"),
    "a fraction": (lambda s: {"count": torch.tensor(1.5)}, TypeError, "`selection.count` must be an int32 tensor"),
    "two counts": (lambda s: {"count": torch.ones(2).int()}, ValueError, "`selection.count` must have one element"),
    "a number": (lambda s: {"count": 2}, TypeError, "`selection.count` must be an int32 tensor, got int 2"),
    "a long overflow": (lambda s: {"overflow": torch.zeros(2).int()}, ValueError, "`selection.overflow` must have one"),
    "a real overflow": (lambda s: {"overflow": torch.tensor(0.0)}, TypeError, "`selection.overflow` must be an int32"),
    "a size of none": (lambda s: {"size": None}, TypeError, "`selection.size` must be an int, got NoneType"),
    "a size below 0": (lambda s: {"size": -1}, ValueError, "`selection.size` must be 0 or above, got -1"),
}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_part_is_refused_by_name(name, move, backend):
    change, error, message = WRONG[name]
    selection = sk.compact(MASK, capacity=4)
    by_hand = selection._replace(**change(selection))
    with pytest.raises(error) as raised:
        MOVES[move](rows_for(move, selection), by_hand, backend=backend)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["gather_rows", "scatter_rows"])
def test_operators_check_what_they_are_given(name):
    operator = getattr(torch.ops.sparse_kernels, name)
    rows, count = torch.arange(6.0), torch.tensor(6, dtype=torch.int32)
    for index, error in ((torch.zeros(2, 3).long(), ValueError), (torch.zeros(6), TypeError)):
        with pytest.raises(error, match=r"`selection\.index`"):
            operator([rows], index, count, 6, "cpp")
    with pytest.raises(TypeError, match=r"`selection\.count`"):
        operator([rows], torch.arange(6), torch.tensor(1.5), 6, "cpp")


INDICES = st.lists(st.one_of(st.integers(-3, 9), st.sampled_from([2**31, -(2**62), 2**62])), max_size=9)


@settings(max_examples=200, deadline=None)
@given(index=INDICES, count=st.integers(-2, 11), size=st.integers(0, 8), move=st.sampled_from(sorted(MOVES)))
def test_backends_agree_on_any_selection_by_hand(index, count, size, move):
    """The same rows, or a ValueError: on each backend, and nothing else."""
    slots = len(index)
    selection = sk.Selection(
        torch.tensor(index, dtype=torch.int64), torch.ones(slots), torch.tensor(count, dtype=torch.int32),
        torch.tensor(0, dtype=torch.int32), size,
    )  # fmt: skip
    rows = torch.arange(1.0, 1.0 + (size if move == "gather" else slots))
    kept = index if move == "gather" else index[: max(count, 0)]
    legal = all(0 <= i < size for i in kept) and (move == "gather" or 0 <= count <= slots)
    if size == 0 and move == "gather":
        legal = True  # nothing is read
    for backend in (None, *BACKENDS):
        if not legal:
            with pytest.raises(ValueError, match=r"selection (index|count) .* (outside|does not fit)"):
                MOVES[move](rows, selection, backend=backend)
            continue
        out = MOVES[move](rows, selection, backend=backend).tolist()
        if move == "gather":
            assert out == [0.0 if size == 0 else 1.0 + i for i in index]
        elif len(set(kept)) == len(kept):  # of repeats any
            expected = [0.0] * size
            for slot, row in enumerate(kept):
                expected[row] = 1.0 + slot
            assert out == expected


def test_an_unknown_instruction_set_is_one_line():
    if "cpp" not in BACKENDS:
        pytest.skip("the C++ backend was not built")
    environment = {**os.environ, "SPARSE_KERNELS_CPU": "avx9"}
    done = fresh.run("-c", "import sparse_kernels", environment=environment)
    assert done.returncode == 1
    assert done.stderr.strip().split("\n")[-1] == (
        "ValueError: `SPARSE_KERNELS_CPU` must be an instruction set to use: "
        "unknown instruction set 'avx9'; known: portable, avx2, avx512, neon"
    )
    assert "During handling" not in done.stderr
