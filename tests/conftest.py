"""Before any test module: whoever imports triton first decides for the process whether its kernels are interpreted."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import file_seconds
import process_state
import pytest
import torch
from known import register

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-seconds", action="store_true", help="write tests/file_seconds.txt")


def pytest_configure(config: pytest.Config) -> None:
    register(config)
    if config.getoption("record_seconds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(file_seconds.Recorder(config.rootpath))
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:  # as behind nohup; tests that interrupt need it
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    file_seconds.order(items, file_seconds.read())


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
