"""A small model trained beside the trained one."""

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
    """A small model trained beside, on the rows that the model is trained on.

    Its scoring, of all rows, and its training, of the kept ones, are both in the step's cost.

    Args:
        model: module with the trained model's inputs and outputs, which is copied; or, for images, a callable that
            takes ``shape`` (channels, height, width) and ``classes`` and returns one, such as
            ``ModelFactory("cnn-tiny")``.
        lr: learning rate of its AdamW, above 0; it follows the trained model's schedule. Default 1e-3.
        seed: seed of its initial weights. Default 0.
        precision: precision of its scoring pass; None for the trainer's.
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
        self._given = (model,)  # in a tuple: what is trained is a copy

    def build(self, batch: Batch, logits: Any) -> None:
        (model,) = self._given
        if isinstance(model, nn.Module):
            self.start()
        elif isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 4 and isinstance(logits, Tensor):
            self.start(tuple(batch.inputs.shape[1:]), logits.shape[1])
        else:
            raise UserError(f"the proxy {model} is for images, [B, C, H, W]: wanted a module made for these inputs")

    def make(self, shape: tuple[int, int, int] | None = None, classes: int = 0) -> nn.Module:
        (model,) = self._given
        if isinstance(model, nn.Module):
            return copy.deepcopy(model)
        assert shape is not None
        return model(shape=shape, classes=classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def logits(self, inputs: Any) -> Any:
        net = self.trained().net
        with evaluation_statistics(net):
            return forward(net, inputs)

    def learn(self, kept: SelectedBatch) -> None:
        self.trained().learn(kept.inputs, kept, self.criterion)

    def extra_repr(self) -> str:
        (model,) = self._given
        return f"model={type(model).__name__ if isinstance(model, nn.Module) else model}"
