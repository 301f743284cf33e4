"""Prices of 53,940 round cut diamonds, a table that the package plotnine ships: regression."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from sparse_training.data.tensors import TensorData, TensorSplit, package_folder, part
from sparse_training.errors import UserError

FILE = "diamonds.csv"
NUMBERS = ("carat", "depth", "table", "x", "y", "z")
GRADES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": ("D", "E", "F", "G", "H", "I", "J"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
TARGET = "price"
FEATURES = len(NUMBERS) + sum(map(len, GRADES.values()))
TEST_SHARE = 0.2
SEED = 20_242


def load(folder: str | Path | None = None) -> TensorData:
    """Load the table: 26 features, and the price as the value to predict, both standardised.

    Args:
        folder: folder of ``diamonds.csv``. Default: that of the package plotnine.

    Returns:
        The data set; a fifth of the rows is the test split. Means and deviations are those of the training rows.

    Raises:
        UserError: the package is not installed, or the file is missing or has other columns.
    """
    if folder is None:
        folder = package_folder("plotnine", data="diamonds", requirement="--no-deps plotnine") / "data"
    path = Path(folder) / FILE
    features, prices = _read(path)
    train, test = part(TensorSplit(features, prices), TEST_SHARE, SEED)
    numbers = len(NUMBERS)
    mean, std = train.images[:, :numbers].mean(0), train.images[:, :numbers].std(0).clamp(min=1e-6)
    centre, spread = train.labels.mean(), train.labels.std().clamp(min=1e-6)

    def standardised(split: TensorSplit) -> TensorSplit:
        scaled = (split.images[:, :numbers] - mean) / std
        inputs = torch.cat((scaled, split.images[:, numbers:]), 1).float()
        return TensorSplit(inputs, ((split.labels - centre) / spread).float())

    return TensorData("diamonds", standardised(train), standardised(test), (), f"diamonds, {path}")


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Features, float64 [N, 26], grades as one column for each, and prices, float64 [N]."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        features = [
            [float(row[name]) for name in NUMBERS]
            + [float(row[name] == grade) for name, grades in GRADES.items() for grade in grades]
            for row in rows
        ]
        prices = [float(row[TARGET]) for row in rows]
    except OSError as error:
        raise UserError(f"data set diamonds: cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"data set diamonds: {path} must have columns of carat to price, got {error}") from error
    inputs = torch.tensor(features, dtype=torch.float64).reshape(-1, FEATURES)
    if len(inputs) < 10 or not bool((inputs[:, len(NUMBERS) :].sum(1) == len(GRADES)).all()):
        raise UserError(f"data set diamonds: {path} must have rows of known cut, color and clarity, at least 10")
    return inputs, torch.tensor(prices, dtype=torch.float64)
