"""Seconds of a rank's step by number of rows, for the simulation of many ranks: measured, or given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_training.errors import UserError
from sparse_training.files import read_json_object
from sparse_training.training.clock import Costs, Curve

FORWARDS = 3.0  # forward passes that training on a row costs, where scoring was not measured


@dataclass(frozen=True)
class StageCosts:
    """Seconds of the stages of a step of one rank.

    Between and beyond the measured numbers of rows the seconds are linear.

    Args:
        load: curve of loading.
        score: curve of scoring a loaded batch, a forward pass.
        train: curve of training: forward, backward and the optimizer's step.
        select: curves of selecting rows, by policy; a policy without one costs nothing. Default: none.
    """

    load: Curve
    score: Curve
    train: Curve
    select: Mapping[str, Curve] = field(default_factory=dict)

    @classmethod
    def from_costs(cls, costs: Costs) -> StageCosts:
        """Take the costs of ``calibrate``; without a gate among them, scoring is a third of training."""
        rows, seconds = costs.shared["train"]
        third = (rows, tuple(spent / FORWARDS for spent in seconds))
        score = costs.own.get("gate", {}).get("score", third)
        select = {name: curves["select"] for name, curves in costs.own.items()}
        return cls(costs.shared["load"], score if any(score[1]) else third, costs.shared["train"], select)

    @classmethod
    def from_step(
        cls, batch_size: int, *, load: float, forward: float, backward: float, optimizer: float
    ) -> StageCosts:  # fmt: skip
        """Take the seconds of one dense step; all but the optimizer's are in proportion to the rows.

        Args:
            batch_size: rows of the step, at least 2.
            load: seconds of loading it.
            forward: seconds of the forward pass.
            backward: seconds of the backward pass.
            optimizer: seconds of the optimizer's step, whatever the rows.

        Raises:
            UserError: a batch of fewer than 2 rows, or no time at all for the passes.
        """
        if batch_size < 2:
            raise UserError(f"costs in proportion to the rows need a batch of at least 2 rows, got {batch_size}")
        if not forward + backward > 0.0:
            raise UserError("the forward and backward pass must take some time, got 0 seconds")
        rows = (1, batch_size)

        def line(seconds: float, constant: float = 0.0) -> Curve:
            return rows, (constant + seconds / batch_size, constant + seconds)

        return cls(line(load), line(forward), line(forward + backward, optimizer))


def curve_seconds(curve: Curve | None, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Evaluate a curve at numbers of rows of any shape; 0 without a curve or without rows."""
    if curve is None:
        return np.zeros(rows.shape)
    at, seconds = np.asarray(curve[0], float), np.asarray(curve[1], float)
    found = np.interp(rows, at, seconds)
    # The slope of the whole curve: between two near points it would be noise. A single point is in proportion.
    rise, run = (seconds[-1] - seconds[0], at[-1] - at[0]) if len(at) > 1 else (seconds[-1], at[-1])
    slope = max(0.0, rise / run)
    beyond = np.asarray(np.where(rows > at[-1], seconds[-1] + slope * (rows - at[-1]), found))
    return np.where(rows > 0, beyond, 0.0)


def read_costs(path: str | Path) -> tuple[StageCosts, int]:
    """Read measured costs.

    Args:
        path: calibration.json of a study or comparison, or advice.json of ``sparse-train advise``.

    Returns:
        The costs, and the rows of the batch that they were measured on.

    Raises:
        UserError: the file holds neither.
    """
    found = read_json_object(Path(path))
    try:
        if "times" in found:
            times, batch_size = found["times"], int(found["batch_size"])
            stages = {name: float(times[name]) for name in ("load", "forward", "backward", "optimizer")}
            return StageCosts.from_step(batch_size, **stages), batch_size
        costs = Costs.from_dict(found)
        return StageCosts.from_costs(costs), costs.shared["train"][0][-1]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} must be calibration.json of compare or study, or advice.json of advise, got another file"
        ) from None
