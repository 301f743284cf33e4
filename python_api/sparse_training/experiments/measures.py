"""Measures of success: a score for each row, whose mean is the measure; higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_training.data.loader import Loader
from sparse_training.evaluation import evaluation_statistics, forward


class Measure(NamedTuple):
    """A measure that is the mean of its rows' scores.

    Attributes:
        name: name in reports, such as "accuracy".
        scores: maps the outputs [N, ...] and the targets [N] of a whole split to float64 [N].
    """

    name: str
    scores: Callable[[Tensor, Tensor], Tensor]


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for each row whose largest logit is its class's, else 0."""
    return (outputs.argmax(1) == targets).double()


def explained(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 - e²/v for each row, with e its error and v the variance of the split's targets: the mean is R²."""
    targets = targets.double()
    variance = (targets - targets.mean()).square().mean().clamp(min=1e-12)
    return 1.0 - (outputs.double() - targets).square() / variance


ACCURACY = Measure("accuracy", correct)
R_SQUARED = Measure("R²", explained)


@torch.no_grad()
def row_scores(model: nn.Module, loader: Loader, measure: Measure) -> Tensor:
    """Score every row of a loader, in its order, with the model in evaluation mode.

    Args:
        model: the model.
        loader: loader in order, each row once.
        measure: measure to score by.

    Returns:
        float64 [N] on the CPU.
    """
    outputs, targets = [], []
    with evaluation_statistics(model):
        for item in loader:
            batch = loader.load(item)
            outputs.append(forward(model, batch.inputs).float())
            targets.append(batch.targets)
    return measure.scores(torch.cat(outputs), torch.cat(targets)).cpu()
