"""A comparison's clock calibrated in a moment: for tests of what comes after it."""

import pytest

MODULE = "sparse_training.profiling.calibration"


def short_calibration(patch: pytest.MonkeyPatch) -> None:
    """Time a round of blocks of two steps, where 5 rounds of 12 steps and 5 seconds are usual."""
    for name, value in {"CALIBRATION_SECONDS": 0.0, "MIN_ROUNDS": 1, "BLOCK": 2, "SHORT_BLOCK": 2}.items():
        patch.setattr(f"{MODULE}.{name}", value)
