"""Published claims of the original system."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """One published figure."""

    setting: str
    rate: float | None  # claimed fraction of rows trained on; None where none was given
    speedups: tuple[float, ...]  # claimed, over dense training
    accuracy: float | None  # best accuracy claimed, a fraction
    basis: str  # how the speed-up was computed


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
    """Find the claim at the rate nearest to ``rate``.

    Args:
        rate: fraction of rows kept, in (0, 1].
        tolerance: largest distance of the claim's rate. Default 0.01.

    Returns:
        The claim, or None where none is near enough.
    """
    near = [claim for claim in CLAIMS if claim.rate is not None and abs(claim.rate - rate) <= tolerance]
    return min(near, key=lambda claim: abs((claim.rate or 0.0) - rate), default=None)
