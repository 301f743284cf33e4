"""What the original system (adaptive-sparse-training 1.0.1 and its scripts) claimed, and its control law.

The claims are printed beside what is measured here. None of its speed-ups was a measurement: they are formulas of the
rate, and its one run beside a dense one took 147 s against 146 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Claim(NamedTuple):
    """One published figure."""

    setting: str
    rate: float | None  # fraction of rows said to be trained on; None where none was given
    speedups: tuple[float, ...]  # over dense training, as claimed
    accuracy: float | None  # fraction, the best it claimed
    basis: str  # what the speed-up was made of


CLAIMS = (
    Claim("CIFAR-10, 3 epochs, CPU, 489.5 s", 0.012, (86.5,), 0.2771, "1/rate; the rate is a probe every 100 rows"),
    Claim("CIFAR-10, 10 epochs, CPU, 574.9 s", 0.106, (8.6, 10.4), 0.4836,
          "1/(rate + 0.01); 10.4 against an epoch assumed to take 600 s"),
    Claim("CIFAR-10, projected", 0.06, (16.0,), 0.70, "a projection: not run"),
    Claim("CIFAR-10, 10 epochs, batch 128", 0.357, (), 0.7446, '"64.3% saved"; 147 s, dense 146 s and 76.55%'),
    Claim("T4 GPU, projected", None, (43.0, 100.0), None, "a projection: not run"),
    Claim("TPU, projected", None, (320.0, 600.0), None, "a projection: not run"),
    Claim("ImageNet-100, ResNet-50, pretrained", 0.39, (1.92,), 0.9212, "dense epoch 9.99 min, its own 10.37 min"),
    Claim("ImageNet-100, ResNet-50, two stages", None, (2.78,), 0.9192, "dense epoch 10.24 min, its own 11.03 min"),
    Claim("ViT, sparse attention", None, (12.0,), None, "three dense products under masks: slower than one"),
)  # fmt: skip


def claim_at(rate: float, tolerance: float = 0.01) -> Claim | None:
    """The claim at the rate nearest to ``rate``, None where none is within ``tolerance`` of it."""
    near = [claim for claim in CLAIMS if claim.rate is not None and abs(claim.rate - rate) <= tolerance]
    return min(near, key=lambda claim: abs((claim.rate or 0.0) - rate), default=None)


@dataclass
class PackageLaw:
    """The package's controller: a clamped threshold, fed the rate after the fallback to the most significant tenth.

    ``target`` is a number or an array of them; the state has its shape.
    """

    target: Any
    threshold: Any = 3.0
    integral: Any = 0.0
    rate: Any = None  # smoothed; starts at the target

    def __post_init__(self) -> None:
        self.rate = self.target if self.rate is None else self.rate

    @staticmethod
    def least(rows: int) -> int:
        """How many of a batch's rows it keeps at least, the most significant."""
        return max(2, rows // 10)

    def observe(self, kept: Any) -> None:
        """Takes a step on the fraction kept of a batch, of the target's shape."""
        self.rate = 0.1 * kept + 0.9 * self.rate
        error = self.rate - self.target
        inside = (self.threshold > 0.5) & (self.threshold < 10)
        self.integral = np.where(inside, np.clip(self.integral + error, -100, 100), 0.9 * self.integral)
        self.threshold = np.clip(self.threshold + 0.005 * error + 0.0001 * self.integral, 0.5, 10)
