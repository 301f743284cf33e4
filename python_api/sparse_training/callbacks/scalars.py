"""A run's numbers by step: what loggers write, and the one that writes CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from sparse_training import files
from sparse_training.arguments import check_integer
from sparse_training.errors import UserError
from sparse_training.training.callbacks import Callback, Run
from sparse_training.training.log import evaluation_numbers

INTERVAL = 50  # steps


class ScalarLogger(Callback):
    """Writes a run's numbers every so many steps; subclass it and override ``write``, ``open`` and ``close``.

    The numbers: ``train/loss`` (mean loss of the rows that the latest batch was trained on), ``train/learning_rate``,
    ``train/epoch``, ``clock/seconds``, of a policy with a controller ``gate/rate`` and ``gate/threshold``, and of every
    evaluation ``eval/<name>``. The first of several processes writes, the others do nothing.

    Args:
        interval: steps between two points, at least 1; reading the loss waits for the device. Every evaluation is
            written, and the last step. Default 50.

    Raises:
        UserError: an interval out of range.
    """

    passive = True

    def __init__(self, interval: int = INTERVAL) -> None:
        self.interval = check_integer("interval", interval, 1)
        self._open, self._written, self._evaluated = False, -1, 0

    def open(self, run: Run) -> None:
        """Begin to write a run, or go on after the step ``run.log.steps``."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        raise NotImplementedError

    def close(self, error: BaseException | None) -> None:
        """End writing; ``error`` is what ended the run, if anything did."""

    def on_fit_start(self, run: Run) -> None:
        """Open the log."""
        if run.first:
            self.open(run)
            self._open, self._written, self._evaluated = True, run.log.steps, len(run.log.evals)

    def on_step_end(self, run: Run) -> None:
        """Write the step's numbers, where they are due."""
        due = run.status.step % self.interval == 0 or len(run.log.evals) > self._evaluated
        if self._open and (due or run.status.progress >= 1.0):
            self._write_step(run)

    def on_fit_end(self, run: Run) -> None:
        """Write the last step, if it is not, and close the log."""
        if self._open:
            if self._written < run.status.step or len(run.log.evals) > self._evaluated:
                self._write_step(run)
            self._open = False
            self.close(None)

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Close the log."""
        if self._open:
            self._open = False
            self.close(error)

    def _write_step(self, run: Run) -> None:
        status = run.status
        values = {"clock/seconds": status.seconds, "train/epoch": float(status.epoch)}
        values["train/learning_rate"] = float(run.trainer.optimizer.param_groups[0]["lr"])
        if status.loss is not None:
            values["train/loss"] = float(status.loss)
        if (trace := status.policy.trace()) is not None:
            values |= {"gate/rate": float(trace[0]), "gate/threshold": float(trace[1])}
        if len(run.log.evals) > self._evaluated:
            values |= {f"eval/{name}": value for name, value in evaluation_numbers(run.log.evals[-1]).items()}
        self._written, self._evaluated = status.step, len(run.log.evals)
        self.write(status.step, values)


class CsvLogger(ScalarLogger):
    """Writes a run's numbers into a CSV file: a row for each step that is written, a column for each number.

    Example:
        >>> trainer.fit(loader, epochs=10, evaluate=validation, callbacks=[CsvLogger("run.csv")])

    Args:
        path: the file, replaced by a new run; a run that is resumed goes on in it. Its folder is made.
        interval: steps between two rows, at least 1. Default 50.

    Raises:
        UserError: an interval out of range.
    """

    def __init__(self, path: str | Path, interval: int = INTERVAL) -> None:
        super().__init__(interval)
        self.path = Path(path)
        self._columns: list[str] = []
        self._file: IO[str] | None = None

    def open(self, run: Run) -> None:
        """Make the file; keep the rows up to the step that the run goes on from."""
        rows: list[dict[str, str]] = []
        self._columns = ["step"]
        if run.log.steps and self.path.is_file():
            with open(self.path, newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or self._columns)
                rows = [row for row in reader if (row.get("step") or "").isdigit()]
            rows = [row for row in rows if int(row["step"]) <= run.log.steps]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        self._rewrite(rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row; a number that is new makes a new column."""
        assert self._file is not None
        if new := [name for name in values if name not in self._columns]:
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        self._writer(self._file).writerow({"step": step, **values})
        self._file.flush()

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        self.close(None)
        files.write_atomic(self.path, text.getvalue().encode())
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def _writer(self, file: IO[str]) -> csv.DictWriter[Any]:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
