"""Operands that another thread changes during a call: results may mix old and new, and hold no foreign memory."""

import fresh
import pytest

from sparse_kernels.backends import cpp as cpp_backend

pytestmark = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="no cpp backend")

# In a process of its own: what goes wrong here is a crash.
CHANGED = """
import threading, time, torch, sparse_kernels as sk
torch.set_num_threads(2)
rows, slots = 4096, 1 << 20
operation, width = {operation!r}, {width}
index = torch.randint(0, rows, (slots,))
good, bad = index.clone(), torch.full((slots,), 1 << 40)
inputs = torch.ones(rows if operation == "gather" else slots, width, dtype=torch.{dtype})
kept = sk.compact(torch.ones(4, dtype=torch.bool))
number = torch.tensor(slots, dtype=torch.int32)
selection = sk.Selection(index, torch.ones(slots), number, torch.zeros_like(number), rows)
mask = torch.rand(slots * 4) < 0.5
other = torch.rand(slots * 4) < 0.5
first = mask.clone()
done = threading.Event()

def change():
    while not done.is_set():
        if operation == "compact":
            mask.copy_(other); mask.zero_(); mask.copy_(first)
        else:
            index.copy_(bad); index.copy_(good)

thread = threading.Thread(target=change)
thread.start()
try:
    began = time.monotonic()
    while time.monotonic() - began < 2.0:
        try:
            if operation == "gather":
                found = sk.gather_rows(inputs, selection, backend="cpp")
                assert bool((found == 1).all()), "foreign memory"
            elif operation == "scatter":
                found = sk.scatter_rows(inputs, selection, backend="cpp")
                assert bool(((found == 1) | (found == 0)).all()), "foreign memory"
            else:
                found = sk.compact(mask, backend="cpp")
                assert bool(((found.index >= 0) & (found.index < len(mask))).all()), "unwritten slots"
                assert bool(((found.weight == 0) | (found.weight == 1)).all()), "unwritten slots"
        except (ValueError, IndexError):
            pass  # the index was looked at while it was wrong
finally:
    done.set()
    thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "width", "dtype"),
    [
        ("gather", 1, "int64"),
        ("gather", 3, "float32"),
        ("scatter", 1, "int64"),
        ("scatter", 3, "float32"),
        ("compact", 1, "int8"),
    ],
)
def test_an_operand_changed_by_another_thread_is_bounded(operation, width, dtype):
    source = CHANGED.format(operation=operation, width=width, dtype=dtype)
    done = fresh.run("-c", source)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"
