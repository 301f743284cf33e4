"""Seconds that each test file takes, by which a run begins with the longest: begun last, one would keep a process long
after the others have ended.

``make test-all RECORD=1`` writes ``tests/file_seconds.txt``, on an idle machine. What matters is their order: they are
rounded, and files of a few seconds are left out.
"""

from collections import Counter
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "file_seconds.txt"
STEP = 5  # seconds


def read(table: Path = TABLE) -> dict[str, int]:
    """Return the recorded seconds by file, as node ids name it."""
    entries = (line.split() for line in table.read_text().splitlines())
    return {name: int(seconds) for seconds, name in entries}


def order(items: list[pytest.Item], seconds: dict[str, int]) -> None:
    """Put files of many seconds first, then those with many slow tests: they may be new."""
    slow = Counter(_file(item.nodeid) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-seconds.get(_file(item.nodeid), 0), -slow[_file(item.nodeid)]))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class Recorder:
    """Adds up what the tests of each file take, and writes the files that ran into the table."""

    def __init__(self, root: Path, table: Path = TABLE) -> None:
        self.root, self.table = root, table
        self.spent: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.spent[_file(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        measured = {name: STEP * round(spent / STEP) for name, spent in self.spent.items()}
        found = {name: seconds for name, seconds in (read(self.table) | measured).items() if seconds}
        lines = sorted((-seconds, name) for name, seconds in found.items() if (self.root / name).exists())
        self.table.write_text("".join(f"{-seconds} {name}\n" for seconds, name in lines))
