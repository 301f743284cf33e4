"""Result files: read and validated by a shape for each format, and written as JSON.

Keys are those of version 0.1.0, where a method is an "arm" and a speed-up bound a "ceiling", so that recorded results
are read. A run's "accuracy" is the task's measure on test rows, "validation" that on validation rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from sparse_training.errors import UserError
from sparse_training.experiments.formats import COMPARISON, STUDY, ResultFormat
from sparse_training.files import read_json

Result = Mapping[str, Any]

# A shape is a type or types; {key: shape}, where ... stands for every other key; or [shape of every item].
NUMBER = (int, float)
MAYBE = (int, float, NoneType)
_FACTS = {
    "created": str,
    "command": str,
    "environment": {},
    "settings": {"data": str, "model": str},
}
_RUN = {
    "seed": int,
    "accuracy": MAYBE,
    "seconds": NUMBER,
    "steps": int,
    "target": MAYBE,
    "phases": {...: int},
    "evals": [{"seconds": NUMBER, "accuracy": MAYBE}],
    "trace": [{"step": int, "rate": MAYBE, "threshold": MAYBE}],
    "warnings": [str],
}
_SUMMARY = {
    "accuracy_mean": MAYBE,
    "accuracy_std": MAYBE,
    "seconds_mean": NUMBER,
    "raw_seconds_mean": NUMBER,
    "rows_trained_mean": NUMBER,
    "rate_mean": MAYBE,
}
_VERDICT = {"task": str, "arm": str, "n": int, "accuracy": NUMBER, "deviation": MAYBE}
SHAPES: dict[ResultFormat, dict[str, Any]] = {
    COMPARISON: {
        **_FACTS,
        "calibration": {"arms": {...: {"total": NUMBER}}},
        "speedup": {...: {...: MAYBE}},
        "arms": {...: {"runs": [_RUN], "summary": _SUMMARY}},
    },
    STUDY: {
        **_FACTS,
        "missing": int,
        "calibration": {"arms": {...: {"total": NUMBER}}, "offered": {...: int}, "ceilings": {}},
        "score": {...: {"tasks": int}},
        "table": [_VERDICT],
        "tasks": {...: {"says": str, "rows": int, "arms": {...: {...: [_RUN]}}, "galleries": {}}},
    },
}


def read_result(path: str | Path, kind: ResultFormat) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: file to read.
        kind: format that it must have: ``COMPARISON`` or ``STUDY``.

    Returns:
        The result, with every entry that a report needs.

    Raises:
        UserError: a file that cannot be read, is of another format or version, or is damaged.
    """
    name = str(path)
    result = read_json(Path(path))
    if not isinstance(result, dict) or result.get("format") != kind.name:
        raise UserError(f"{name!r} is not the result of a {kind.kind} (format {kind.name!r})")
    version = result.get("version")
    if version not in range(1, kind.version + 1):
        known = "version 1" if kind.version == 1 else f"versions 1 to {kind.version}"
        raise UserError(f"{name!r} has version {version!r}; this program reads {known}")
    wrong = fault(result, SHAPES[kind])
    if wrong is None and kind == COMPARISON and not all(arm["runs"] for arm in (result["arms"] or _NONE).values()):
        wrong = "arms have no runs"
    if wrong:
        raise UserError(f"{name!r} is a damaged result of a {kind.kind}: {wrong}")
    return _from_version_1(result) if kind == STUDY and version == 1 else result


def _from_version_1(result: dict[str, Any]) -> dict[str, Any]:
    """A study of version 1 in the form of today's: compared with random, by the seeds alone, with no adjustment."""
    unknown = dict.fromkeys(("validation", "validation_difference", "not_worse", "verdict"))
    score = {
        method: {
            "tasks": one["tasks"],
            "better": one["surely_better"],
            "worse": one["surely_worse"],
            "not_worse": one["not_worse"],
            "undecided": one["tasks"] - one["surely_better"] - one["surely_worse"],
            "worst": one["worst"],
            "validation": None,
        }
        for method, one in result["score"].items()
    }
    of_task = {"measure": "accuracy", "validation_rows": None, "test_rows": result["settings"].get("test_rows")}
    return {
        **result,
        "baseline": "random",
        "margin": 0.001,
        "ladders": {},
        "score": score,
        "again": None if result["again"] is None else {**result["again"], "tests": {}},
        "table": [{**unknown, **row} for row in result["table"]],
        "tasks": {
            name: {**of_task, "seconds": result["settings"].get("seconds"), **task}
            for name, task in result["tasks"].items()
        },
    }


_NONE: dict[str, Any] = {"": {"runs": []}}


def find_result(folder: str | Path) -> tuple[ResultFormat, dict[str, Any]]:
    """Read the result in a run's folder, of a study or of a comparison.

    Raises:
        UserError: no result there, or one that cannot be read.
    """
    kind = STUDY if Path(folder, STUDY.file).exists() else COMPARISON
    return kind, read_result(Path(folder, kind.file), kind)


def to_json(result: Result, indent: int | None = None) -> bytes:
    """Write a result as JSON; NaN and infinities, which JSON does not have, become null."""
    return (json.dumps(_finite(result), indent=indent, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fault(value: Any, shape: Any, where: str = "") -> str | None:
    """Describe the first fault of a value's shape; None for none.

    Args:
        value: the value.
        shape: a type or types; {key: shape}, where ... stands for every other key; or [shape of every item].
        where: path of the value, in the description.
    """
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        faults = (fault(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        named = [key for key in shape if key is not ...]
        keys = [*named, *(key for key in value if key not in shape)] if ... in shape else named
        missing = [key for key in keys if key not in value]
        if missing:
            return f"{where} lacks {missing[0]!r}"
        faults = (fault(value[key], shape.get(key, shape.get(...)), f"{where}/{key}") for key in keys)
    else:
        return None if isinstance(value, shape) else f"{where} is {str(value)[:40]!r}"
    return next(filter(None, faults), None)
