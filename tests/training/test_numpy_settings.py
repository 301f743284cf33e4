"""Settings that are NumPy's numbers, as of a search over np.linspace or np.arange."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparse_training import Callback, ResidentLoader, SparseTrainer, TrainerSettings, UserError
from sparse_training.data.splits import Split

ROWS = 32


def make(settings: dict[str, Any], **options: Any) -> SparseTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return SparseTrainer(model, settings=TrainerSettings(**settings), **options)


def loader() -> ResidentLoader:
    images = (torch.arange(4 * ROWS) % 251).to(torch.uint8).reshape(ROWS, 1, 2, 2)
    return ResidentLoader(Split(images, torch.arange(ROWS) % 3), batch_size=8)


class Counts(Callback):
    """Counts steps by NumPy."""

    def __init__(self) -> None:
        self.steps = np.int64(0)

    def on_step_end(self, run: Any) -> None:
        self.steps += np.int64(1)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [self.steps, (np.float32(0.5),)]}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"][0]


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"seed": np.int64(3)}),
        ({}, {"dense_start": np.float64(0.1)}),
        ({}, {"dense_end": np.float32(0.125)}),
        ({}, {"lr": np.float32(1e-2), "policy": "random", "rate": np.float64(0.5)}),
        ({"clip_norm": np.float64(1.0), "ema": np.float64(0.9), "accumulate": np.int64(2)}, {}),
    ],
)
def test_a_run_with_numpys_numbers_is_resumed(tmp_path, settings, options):
    whole = make(settings, **options)
    whole.fit(loader(), steps=6, progress=False)
    parted = make(settings, **options)
    steps: list[int] = []

    def stop() -> bool:
        steps.append(1)
        return len(steps) == 3

    assert parted.fit(loader(), steps=6, checkpoint=tmp_path, stop=stop, progress=False).interrupted
    resumed = make(settings, **options)
    resumed.fit(loader(), steps=6, checkpoint=tmp_path, resume=True, progress=False)
    assert torch.equal(resumed.model[1].weight, whole.model[1].weight)


def test_a_callbacks_numpy_numbers_are_restored(tmp_path):
    make({}).fit(loader(), steps=2, checkpoint=tmp_path, callbacks=[Counts()], progress=False)
    counts = Counts()
    make({}).fit(loader(), steps=3, checkpoint=tmp_path, resume=True, callbacks=[counts], progress=False)
    assert counts.steps == 3


def test_a_seed_is_an_integer():
    with pytest.raises(UserError, match="`seed` must be an integer, got '3'"):
        make({}, seed="3")
