"""A run begins with the files that took longest, and can record what they took."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import file_seconds

ROOT = Path(__file__).parents[1]


def item(nodeid: str, slow: bool = False) -> Any:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: slow and name == "slow")


def test_the_longest_files_come_first_and_each_keeps_the_order_of_its_tests() -> None:
    items = [
        item("a::1"),
        item("b::1", slow=True),
        item("b::2"),
        item("c::1"),
        item("d::2"),
        item("d::1"),
        item("a::2"),
    ]
    file_seconds.order(items, {"c": 5, "d": 20})
    assert [one.nodeid for one in items] == ["d::2", "d::1", "c::1", "b::1", "b::2", "a::1", "a::2"]


def test_a_record_replaces_files_that_ran_and_leaves_out_short_and_absent_ones(tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    table.write_text("40 test_kept.py\n35 test_gone.py\n30 test_long.py\n25 test_now_short.py\n")
    for name in ("test_kept.py", "test_long.py", "test_now_short.py", "test_new.py"):
        (tmp_path / name).touch()
    recorder = file_seconds.Recorder(tmp_path, table)
    for nodeid, duration in (
        ("test_long.py::test[a::b]", 50.0), ("test_long.py::test", 8.0), ("test_new.py::test", 7.6),
        ("test_now_short.py::test", 2.4),
    ):  # fmt: skip
        report: Any = SimpleNamespace(nodeid=nodeid, duration=duration)
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_sessionfinish()
    assert table.read_text() == "60 test_long.py\n40 test_kept.py\n10 test_new.py\n"


def test_the_table_names_files_that_there_are() -> None:
    recorded = file_seconds.read()
    assert recorded
    for name, seconds in recorded.items():
        assert (ROOT / name).exists(), f"{name}: take it out of {file_seconds.TABLE.name}"
        assert seconds > 0
