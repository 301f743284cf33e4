"""Messages of a run by ``logging``, and a line that is rewritten while it runs."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from sparse_training.errors import UserError
from sparse_training.training.callbacks import Callback, Run
from sparse_training.training.log import Status, evaluation_numbers, in_words

logger = logging.getLogger("sparse_training")

PHASES = {"warmup": "dense start", "sparse": "", "anneal": "dense end"}
REFRESH = 0.2  # seconds between two drawings of the line
WIDTH = 20  # characters of the bar


def usual_callbacks(progress: bool | Callable[[Status], None]) -> list[Callback]:
    """Make the callbacks that every run has.

    Args:
        progress: True for a progress line where standard error is a terminal or a notebook; False for none; or a
            function of the status, which is called in its place.

    Raises:
        UserError: something else.
    """
    if isinstance(progress, bool):
        return [Messages(), *([ProgressLine()] if progress and is_watched(sys.stderr) else [])]
    if not callable(progress):
        raise UserError(
            "`progress` must be True, False or a function of the status; callbacks go in `callbacks`, "
            f"got {type(progress).__name__}"
        )
    return [Messages(), _Reports(progress)]


class Messages(Callback):
    """Logs a run's start, evaluations, end and warnings by the logger "sparse_training"; every run has it.

    Start, evaluations and end have the level INFO, which Python shows where ``logging.basicConfig(level="INFO")`` was
    called, checkpoints DEBUG. Warnings have the level WARNING, which is shown unless something else was asked for.
    """

    passive = True

    def on_fit_start(self, run: Run) -> None:
        """Log what is trained."""
        if run.first:
            begins = f"goes on from step {run.log.steps}" if run.log.steps else "begins"
            logger.info(
                "training %s: %s, policy %s, on %s", begins, run.settings["budget"], run.trainer.policy.name,
                run.trainer.device,
            )  # fmt: skip

    def on_evaluation_end(self, run: Run) -> None:
        """Log the numbers."""
        if run.first:
            logger.info("step %d: %s", run.status.step, ", ".join(figures(run.status)))

    def on_checkpoint_saved(self, run: Run) -> None:
        """Log where."""
        if run.first:
            logger.debug("step %d: checkpoint %s", run.log.steps, run.checkpoint)

    def on_fit_end(self, run: Run) -> None:
        """Log the end and the warnings."""
        if not run.first:
            return
        log = run.log
        how = "was interrupted" if log.interrupted else "ended" if log.stopped is None else f"ended: {log.stopped},"
        logger.info(
            "training %s after %d steps, %.1f s, %d of %d rows trained on", how, log.steps, log.seconds,
            int(log.rows_trained), int(log.rows_seen),
        )  # fmt: skip
        for warning in log.warnings:
            logger.warning("%s", warning)

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Log where the run ended."""
        if run.first:
            logger.info("training ended by %s after step %d", type(error).__name__, run.log.steps)


class ProgressLine(Callback):
    """Draws how far a run is, on one line of standard error; in a notebook too. It needs no package.

    Args:
        file: where to draw. Default: standard error, as it is when the run begins.
    """

    passive = True

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self._drawn, self._length = -math.inf, 0
        self._began = (0.0, 0.0)  # seconds of the wall clock and progress

    def on_fit_start(self, run: Run) -> None:
        """Begin a line."""
        self._drawn, self._length = -math.inf, 0
        self._began = time.monotonic(), run.status.progress

    def on_step_end(self, run: Run) -> None:
        """Draw the line, a few times a second."""
        now = time.monotonic()
        if run.first and now - self._drawn > REFRESH:
            self._drawn = now
            self._draw(run, now)

    def on_fit_end(self, run: Run) -> None:
        """Draw the end."""
        if run.first:
            self._draw(run, time.monotonic())
            self._write("\n")

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Leave the line as it is."""
        if run.first and self._length:
            self._write("\n")

    def _draw(self, run: Run, now: float) -> None:
        status = run.status
        done = min(status.progress, 1.0)
        filled = round(WIDTH * done)
        began, from_progress = self._began
        spent, gained = now - began, done - from_progress
        left = f"{_clock(spent * (1.0 - done) / gained)} left" if done < 1.0 and gained > 0 else _clock(spent)
        losses = [] if status.loss is None else [f"loss {float(status.loss):.3g}"]
        bar = f"{done:4.0%} [{'#' * filled}{' ' * (WIDTH - filled)}]"
        parts = [bar, f"step {status.step}", left, *losses, *figures(status), PHASES[status.phase], *status.notes[-1:]]
        text = "  ".join(part for part in parts if part)[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._write("\r" + text.ljust(self._length))
        self._length = len(text)

    def _write(self, text: str) -> None:
        """Write, if anybody can read it: a terminal that is gone ends no run."""
        file = self.file or sys.stderr
        try:
            file.write(text)
            file.flush()
        except (OSError, ValueError):
            pass


class _Reports(Callback):
    """Calls a function with the status after every step."""

    passive = True

    def __init__(self, function: Callable[[Status], None]) -> None:
        self.function = function

    def on_step_end(self, run: Run) -> None:
        self.function(run.status)


def figures(status: Status) -> list[str]:
    """Return the numbers of the latest evaluation in words."""
    numbers = evaluation_numbers(status.evaluation)
    return in_words({f"eval {name}" if name == "loss" else name: value for name, value in numbers.items()})


def is_watched(file: TextIO | None) -> bool:
    """Tell whether somebody watches a stream: a terminal's, or a notebook's."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and type(shell).__name__ == "ZMQInteractiveShell":
        return True
    try:
        return file is not None and file.isatty()
    except ValueError:  # closed
        return False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
