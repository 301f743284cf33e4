"""Progress on a terminal; plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_training.callbacks.display import PHASES
from sparse_training.experiments.design import Cell
from sparse_training.training.log import Status

REFRESH = 0.1  # seconds between updates of a terminal


_D = TypeVar("_D", bound="Display")


class Display:
    """Method, seed, accuracy so far, rate and time left; a line for each finished run where there is no terminal.

    Args:
        total: number of runs.
    """

    def __init__(self, total: float) -> None:
        self.current: tuple[str, int] | None = None
        self.finished = 0
        self.last = -math.inf
        self.quarters = -1  # of the calibration that were shown
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(12),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("calibrating", total=total)

    def __enter__(self: _D) -> _D:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def calibrating(self, fraction: float) -> None:
        """Show how far the calibration is: on a terminal's bar, or in a line for each quarter."""
        if self.console.is_terminal:
            self.refresh(0.0, [f"calibrating the clock {fraction:.0%}"], fraction >= 1.0)
        elif fraction == 0.0 or int(4 * fraction) > self.quarters:
            self.quarters = int(4 * fraction)
            print(f"calibrating the clock {self.quarters / 4:.0%}", file=sys.stderr, flush=True)

    def update(self, method: str, seed: int, status: Status) -> None:
        """Show where a run is, after one of its steps."""
        if self.current != (method, seed):
            self.finished += self.current is not None
            self.current = (method, seed)
        ended = status.progress >= 1.0
        if self.console.is_terminal:
            description = [f"{method} seed {seed}", PHASES[status.phase], *self.figures(status)]
            self.refresh(self.finished + min(status.progress, 1.0), description, ended)
        elif ended:
            steps = f"{status.step} steps in {status.seconds:.1f} s"
            print("  ".join([f"{method} seed {seed}", steps, *self.figures(status)]), flush=True)

    def refresh(self, completed: float, description: list[str], ended: bool) -> None:
        """Move the bar, a few times a second and at the end of a run."""
        if ended or time.monotonic() - self.last > REFRESH:
            self.last = time.monotonic()
            self.bar.update(self.task, completed=completed, description="  ".join(filter(None, description)))

    def figures(self, status: Status) -> list[str]:
        """Accuracy and rate, where they are known."""
        known = [] if status.evaluation is None else [f"accuracy {status.evaluation['accuracy']:.1%}"]
        if (trace := status.policy.trace()) is not None:
            known.append(f"rate {float(trace[0]):.1%}")
        return known


class StudyDisplay(Display):
    """One bar for all runs of a study.

    Args:
        cells: runs that are still to be done, with the seconds of each.
    """

    def __init__(self, cells: Mapping[Cell, float]) -> None:
        self.share = dict(cells)
        super().__init__(total=sum(self.share.values()))
        self.runs, self.done, self.spent = len(self.share), 0, 0.0
        self.began = time.monotonic()

    def step(self, cell: Cell, status: Status) -> None:
        """Show where the study is, after a step of one of its runs."""
        ended = status.progress >= 1.0
        share = self.share.get(cell, 0.0)  # 0 for the weights that runs start from
        spent = self.spent + share * min(status.progress, 1.0)
        if ended:
            self.done, self.spent = self.done + (cell in self.share), spent
        shorter = f" x{cell.fraction:g}" if cell.fraction != 1.0 else ""
        what = f"{cell.task} {cell.method} seed {cell.seed}{shorter}"
        if self.console.is_terminal:
            description = [f"{self.done}/{self.runs}", what, PHASES[status.phase], *self.figures(status)]
            self.refresh(spent, description, ended)
        elif ended:
            elapsed = time.monotonic() - self.began
            left = elapsed * (sum(self.share.values()) / spent - 1.0) if spent else math.nan
            progress = f"{self.done}/{self.runs}, {_duration(left)} left"
            print("  ".join([progress, what, f"{status.step} steps", *self.figures(status)]), flush=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"
