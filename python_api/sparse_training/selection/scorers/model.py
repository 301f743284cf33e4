"""Scores by the trained model itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sparse_training.arguments import check_number
from sparse_training.errors import UserError, one_line
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import Batch


class SelfScorer(Scorer):
    """Scores by the model that is trained: no gradient, evaluation statistics, buffers and generators untouched.

    Args:
        precision: precision of the scoring pass; None (the default) for the trainer's ``scoring_precision``.
        resolution: scale of the images to score, in (0, 1), pooled by area, for a model that takes images of any size.
            None (the default) for the images as they are.

    Raises:
        UserError: a setting is out of range; in ``build``, the inputs are no images, or too small for the model.
    """

    name = "self"

    def __init__(self, *, precision: str | None = None, resolution: float | None = None) -> None:
        super().__init__(precision=precision)
        if resolution is not None:
            check_number("resolution", resolution, "None or in (0, 1)", lambda x: 0 < x < 1)
        self.resolution = resolution

    def logits(self, inputs: Any) -> Any:
        """The model's output with evaluation statistics."""
        if self.resolution is not None:
            inputs = self._reduced(inputs)
        with evaluation_statistics(self.model):
            return forward(self.model, inputs, self.criterion)

    def build(self, batch: Batch, logits: Any) -> None:
        """Check that the model takes images of the lower resolution."""
        if self.resolution is None:
            return
        reduced = self._reduced(batch.inputs)
        try:
            self(batch)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"resolution {self.resolution}: the model takes no images of {list(reduced.shape[2:])} pixels: "
                f"{one_line(error)}"
            ) from None

    def _reduced(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            shape = f"shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else f"type {type(inputs).__name__}"
            raise UserError(f"`resolution` needs images, float [B, C, H, W], got inputs of {shape}")
        assert self.resolution is not None
        size = [max(1, round(self.resolution * side)) for side in inputs.shape[2:]]
        return F.interpolate(inputs, size=size, mode="area")

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return super().extra_repr() if self.resolution is None else f"resolution={self.resolution}"
