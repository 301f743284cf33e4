"""Processes that the tests of several ranks share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from processes import Processes
from rank_parts import RANKS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    processes = Processes(tmp_path_factory.mktemp("ranks"), RANKS)
    yield lambda check, *arguments: processes.run(check, RANKS, *arguments)
    processes.stop()
