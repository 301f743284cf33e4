"""A training run's table in the terminal, and its result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.reporting.result import fault
from sparse_training.reporting.tables import for_console, new_table

RESULT = "result.json"
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
SHAPE: dict[str, Any] = {
    "settings": {"seed": int},
    "run": {
        "seconds": _NUMBER,
        "steps": int,
        "rows_seen": int,
        "rows_trained": int,
        "rate": _MAYBE,
        "evals": [{"seconds": _NUMBER, "step": _NUMBER}],
        "joules": {"measured": _MAYBE, "by": str},
        "flops": {"counted": _NUMBER},
        "warnings": [str],
    },
}
_ENTRIES = ("step", "seconds")


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read the result of a training run.

    Raises:
        UserError: none there, or something else.
    """
    path = Path(folder, RESULT)
    result = files.read_json(path)
    if (wrong := fault(result, SHAPE)) is not None:
        raise UserError(f"{path} is no result of a training run: {wrong}")
    found: dict[str, Any] = result
    return found


def run_lines(result: Mapping[str, Any]) -> list[str]:
    """Say what a run came to, in lines."""
    run, settings = result["run"], result["settings"]
    name = result.get("policy") or settings.get("policy") or "policy by default"
    numbers = result.get("test") or (run["evals"][-1] if run["evals"] else {})
    kept = "" if run["rate"] is None else f", {run['rate']:.1%} of the rows kept in the sparse phase"
    joules = run["joules"]["measured"]
    energy = "energy not measured" if joules is None else f"{joules:.1f} J measured ({run['joules']['by']})"
    stopped = run.get("stopped")
    return [
        f"{name} seed {settings['seed']}: test {', '.join(_numbers(numbers))} after {run['steps']} steps, "
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
    evaluations = result["run"]["evals"]
    names = [name for name in dict.fromkeys(name for one in evaluations for name in one) if name not in _ENTRIES]
    table = new_table()
    for heading in ("step", "seconds", *names):
        table.add_column(heading, justify="right")
    for one in evaluations:
        values = [f"{one[name]:.4f}" if isinstance(one.get(name), float) else "" for name in names]
        table.add_row(f"{one['step']:.0f}", f"{one['seconds']:.1f}", *values)
    if names:
        held_out = result["settings"].get("validation")
        console.print(f"evaluations on {f'{held_out:.0%} of the training rows' if held_out else 'the test set'}:")
        console.print(table)
    for warning in result["run"]["warnings"]:
        console.print(for_console(f"warning: {warning}", console), style="yellow")


def _numbers(numbers: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4g}"
        for name, value in numbers.items()
        if name not in _ENTRIES and isinstance(value, (int, float))
    ]
