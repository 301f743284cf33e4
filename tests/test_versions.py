"""What `make test-versions` runs is what pyproject.toml declares."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "tests" / "versions" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_the_floor_is_the_one_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floor = pins("floor")
    assert project["dependencies"]
    for requirement in project["dependencies"]:
        name, version = re.fullmatch(r"(\w+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert floor[name].removesuffix(".0") == version.removesuffix(".0"), requirement


def test_the_environments_differ_in_what_is_tested_alone() -> None:
    floor, newest = pins("floor"), pins("newest")
    assert {name for name in floor | newest if floor.get(name) != newest.get(name)} == {"torch", "numpy"}
