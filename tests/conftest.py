"""Before any test module: whoever imports triton first decides for the process whether its kernels are interpreted."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import process_state
import pytest
import torch
from known import register

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    register(config)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:  # as behind nohup; tests that interrupt need it
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with many slow tests first: begun last, one would keep a process long after the others have ended."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Spare what is imported from garbage collection: hosts collect after each training, which took up to a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves the state of its process changed; the next one finds it as it was."""
    before, path = process_state.read(), list(sys.path)
    yield
    sys.path[:] = path  # the command line adds the current folder for the rest of its process
    changed = process_state.put_back(before)
    assert not changed, "left behind: " + "; ".join(changed)
