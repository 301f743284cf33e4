"""Formats of result files: what experiments write, and what reports read."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import torch

from sparse_training.experiments.environment import environment


class ResultFormat(NamedTuple):
    """Name, version and file of one kind of result."""

    kind: str  # in messages: "comparison" or "study"
    name: str  # under "format" in the file
    version: int
    file: str

    def header(self, *, command: str, device: torch.device) -> dict[str, Any]:
        """First entries of a result made now: format, version, time, command and environment."""
        return {
            "format": self.name,
            "version": self.version,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "environment": environment(device),
        }


COMPARISON = ResultFormat("comparison", "sparse-training-compare", 1, "compare.json")
STUDY = ResultFormat("study", "sparse-training-study", 2, "study.json")
