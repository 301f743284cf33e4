"""A training run's table in the terminal, and its result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.reporting.result import MAYBE, NUMBER, fault
from sparse_training.reporting.tables import for_console, new_table
from sparse_training.training.log import evaluation_numbers, in_words

RESULT = "result.json"
SHAPE: dict[str, Any] = {
    "settings": {"seed": int},
    "run": {
        "seconds": NUMBER,
        "steps": int,
        "rows_seen": int,
        "rows_trained": int,
        "rate": MAYBE,
        "evals": [{"seconds": NUMBER, "step": NUMBER}],
        "joules": {"measured": MAYBE, "by": str},
        "flops": {"counted": NUMBER},
        "warnings": [str],
    },
}
# Entries that version 0.1.0, or a run of another kind, does not have.
OPTIONAL: dict[str, Any] = {"environment": {}, "test": {}}
OPTIONAL_OF_RUN: dict[str, Any] = {"phases": {...: int}, "trace": [{"step": int, ...: MAYBE}], "notes": [str]}


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read the result of a training run.

    Raises:
        UserError: none there, or something else.
    """
    path = Path(folder, RESULT)
    result = files.read_json(path)
    if (wrong := fault(result, SHAPE) or _optional_fault(result)) is not None:
        raise UserError(f"{path} is no result of a training run: {wrong}")
    found: dict[str, Any] = result
    return found


def _optional_fault(result: Mapping[str, Any]) -> str | None:
    for part, optional, where in ((result, OPTIONAL, ""), (result["run"], OPTIONAL_OF_RUN, "/run")):
        there = {name: shape for name, shape in optional.items() if name in part}
        if (wrong := fault(part, there, where)) is not None:
            return wrong
    return None


def method_name(result: Mapping[str, Any]) -> str:
    """Name of the run's policy."""
    return str(result.get("policy") or result["settings"].get("policy") or "policy by default")


def evaluated_on(result: Mapping[str, Any]) -> str:
    """Name the rows that the run was evaluated on."""
    held_out = result["settings"].get("validation")
    return f"{held_out:.0%} of the training rows" if isinstance(held_out, float) and held_out else "the test set"


def evaluation_names(run: Mapping[str, Any]) -> list[str]:
    """Names of the numbers that the run's evaluations have."""
    return list(dict.fromkeys(name for one in run["evals"] for name in _numbers(one)))


def evaluation_rows(run: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Cells of a row for each of the run's evaluations: step, seconds and its numbers by name."""
    rows = []
    for one in run["evals"]:
        values = [f"{one[name]:.4f}" if isinstance(one.get(name), (int, float)) else "" for name in names]
        rows.append([f"{one['step']:.0f}", f"{one['seconds']:.1f}", *values])
    return rows


def run_lines(result: Mapping[str, Any]) -> list[str]:
    """Say what a run came to, in lines."""
    run, name = result["run"], f"{method_name(result)} seed {result['settings']['seed']}"
    numbers = result.get("test") or (run["evals"][-1] if run["evals"] else {})
    kept = "" if run["rate"] is None else f", {run['rate']:.1%} of the rows kept in the sparse phase"
    joules = run["joules"]["measured"]
    energy = "energy not measured" if joules is None else f"{joules:.1f} J measured ({run['joules']['by']})"
    stopped = run.get("stopped")
    return [
        f"{name}: test {', '.join(in_words(_numbers(numbers)))} after {run['steps']} steps, "
        f"{run['seconds']:.1f} s, {run['rows_trained']} of {run['rows_seen']} rows trained on{kept}",
        *([] if stopped is None else [f"ended early: {stopped}"]),
        f"{run['flops']['counted']:.3g} FLOPs counted, {energy}",
    ]


def print_run(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a run came to, and a row for each of its evaluations.

    Args:
        result: a run's result.
        console: where to print. Default: standard output.
    """
    console = console or Console()
    for line in run_lines(result):
        console.print(for_console(line, console), soft_wrap=True)
    names = evaluation_names(result["run"])
    table = new_table()
    for heading in ("step", "seconds", *names):
        table.add_column(heading, justify="right")
    for row in evaluation_rows(result["run"], names):
        table.add_row(*row)
    if names:
        console.print(f"evaluations on {evaluated_on(result)}:")
        console.print(table)
    for warning in result["run"]["warnings"]:
        console.print(for_console(f"warning: {warning}", console), style="yellow")


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of an evaluation's numbers that are known."""
    return {name: value for name, value in evaluation_numbers(evaluation).items() if isinstance(value, NUMBER)}
