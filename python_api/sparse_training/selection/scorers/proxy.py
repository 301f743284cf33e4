"""Scores by a small model trained alongside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.selection.scorers.auxiliary import AuxiliaryScorer
from sparse_training.selection.types import Batch, SelectedBatch


class ProxyScorer(AuxiliaryScorer):
    """Scores by a small model that is trained alongside, on the rows that the model is trained on.

    The step's cost includes both its scoring of all rows and its training on the kept ones.

    Args:
        model: module with the trained model's inputs and outputs, which is copied; or, for images, a callable that
            takes ``shape`` (channels, height, width) and ``classes`` and returns one, such as
            ``ModelFactory("cnn-tiny")``.
        lr: learning rate of its AdamW, above 0; it follows the trained model's schedule. Default 1e-3.
        seed: seed of its initial weights. Default 0.
        precision: precision of its scoring pass; None (the default) for the trainer's ``scoring_precision``.

    Raises:
        UserError: a setting is out of range; in ``build``, the callable is for images and the inputs are none.
    """

    name = "proxy"

    def __init__(
        self,
        model: nn.Module | Callable[..., nn.Module],
        *,
        lr: float = 1e-3,
        seed: int = 0,
        precision: str | None = None,
    ) -> None:
        super().__init__(lr=lr, seed=seed, precision=precision)
        self._given = (model,)  # in a tuple: a copy is trained

    def build(self, batch: Batch, logits: Any) -> None:
        """Make the proxy for the shape of the first batch."""
        (model,) = self._given
        if isinstance(model, nn.Module):
            self.start()
        elif isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 4 and isinstance(logits, Tensor):
            self.start(tuple(batch.inputs.shape[1:]), logits.shape[1])
        else:
            raise UserError(f"the proxy {model} is for images, [B, C, H, W]; use a module made for these inputs")

    def make(self, shape: tuple[int, int, int] | None = None, classes: int = 0) -> nn.Module:
        """Make the proxy: a copy of the module, or a new one for images of ``shape``."""
        (model,) = self._given
        if isinstance(model, nn.Module):
            return copy.deepcopy(model)
        assert shape is not None
        return model(shape=shape, classes=classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def logits(self, inputs: Any) -> Any:
        """The proxy's output with evaluation statistics."""
        net = self.require_auxiliary().net
        with evaluation_statistics(net):
            return forward(net, inputs)

    def learn(self, kept: SelectedBatch) -> None:
        """Train the proxy on the kept rows."""
        self.require_auxiliary().learn(kept.inputs, kept, self.criterion)

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        (model,) = self._given
        return f"model={type(model).__name__ if isinstance(model, nn.Module) else model}"
