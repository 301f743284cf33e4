"""Scores by an early layer of the model with a linear head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward, unwrap
from sparse_training.selection.scorers.auxiliary import AuxiliaryScorer
from sparse_training.selection.types import Batch, LossFunction, SelectedBatch

GRID = 4  # cells per side of the grid over which an image's features are averaged


class EarlyScorer(AuxiliaryScorer):
    """Scores by a linear head on a layer of the model: the layers behind it run on the kept rows alone.

    Scoring runs the model up to the layer on every row, without gradient, with evaluation statistics and in reduced
    precision. The kept rows then go through the whole model. Its cost s is the early layers' share of the forward
    pass. Keeping the early pass and its graph would save r s, the kept rows' second pass through those layers; but its
    backward pass would run through them with every row, 2 s, which costs more at any rate r below two thirds. So
    BatchNorm, early or late, sees the kept rows alone in training, and scoring leaves its statistics as they were.

    The head learns from the features of the rows that are trained on, read during their forward pass. No gradient
    flows from it into the model.

    Args:
        layer: name of a submodule, as in ``model.get_submodule``, whose output is one tensor.
        pool: maps the output [B, ...] to features [B, F]; None (the default) for ``pooled``.
        lr: learning rate of the head, above 0; it follows the model's schedule. Default 1e-3.
        seed: seed of the head's initial weights. Default 0.
        precision: precision of the early pass; None (the default) for the trainer's ``scoring_precision``.

    Raises:
        UserError: a setting is out of range; in ``attach``, there is no such layer; in ``build``, it is not run or does
            not return a tensor.
    """

    name = "early"

    def __init__(
        self,
        layer: str,
        *,
        pool: Callable[[Tensor], Tensor] | None = None,
        lr: float = 1e-3,
        seed: int = 0,
        precision: str | None = None,
    ) -> None:
        super().__init__(lr=lr, seed=seed, precision=precision)
        self.layer, self.pool = layer, pool or pooled
        self._seen: list[Tensor] = []  # features, float32, of the rows in training

    def attach(
        self, model: nn.Module, criterion: LossFunction, *, device: torch.device, precision: str = "auto"
    ) -> None:
        """Attach the scorer to the model that is trained; see ``Scorer.attach``."""
        super().attach(model, criterion, device=device, precision=precision)
        names = [name for name, _ in unwrap(model).named_modules() if name]
        if self.layer not in names:
            raise UserError(f"the model has no layer {self.layer!r}; use one of {', '.join(names)}")

    def build(self, batch: Batch, logits: Any) -> None:
        """Make the head for the features and classes of the first batch."""
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise UserError(f"the scorer {self.name} needs a model with logits [B, classes]; use another scorer")
        with torch.no_grad():
            self.start(self.features(batch.inputs).shape[1], logits.shape[1])

    def make(self, features: int, classes: int) -> nn.Module:
        """Make the head."""
        head = nn.Linear(features, classes)
        nn.init.zeros_(head.weight)  # starts with equal logits for all classes
        return nn.Sequential(nn.BatchNorm1d(features, affine=False), head)  # layers differ in scale

    def features(self, inputs: Any) -> Tensor:
        """Features float32 [B, F], with evaluation statistics; the model stops behind the layer."""
        found = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        model = unwrap(self.model)
        handle = model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            with evaluation_statistics(model):
                forward(model, inputs)
        except _Reached:
            return self._pool(found[0])
        finally:
            handle.remove()
        raise UserError(f"the layer {self.layer!r} is not run in the model's forward pass")

    def _pool(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise UserError(
                f"the layer {self.layer!r} must return one tensor, got a {type(output).__name__}; use another layer"
            )
        return self.pool(output).float()

    def logits(self, inputs: Any) -> Tensor:
        """The head's logits."""
        features, head = self.features(inputs), self.require_auxiliary().net
        with evaluation_statistics(head), torch.autocast(self.device.type, enabled=False):
            logits: Tensor = head(features)
        return logits

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Read the layer's features during the training forward pass."""
        self._seen = []

        def read(module: nn.Module, arguments: Any, output: Any) -> None:
            self._seen.append(self._pool(output.detach()))

        handle = unwrap(self.model).get_submodule(self.layer).register_forward_hook(read)
        try:
            yield
        finally:
            handle.remove()

    def learn(self, kept: SelectedBatch) -> None:
        """Train the head on the features of the kept rows."""
        rows = kept.targets.shape[0]
        # A compiled forward pass runs no hooks, and that of an empty batch was of a zero row in its place.
        if rows and sum(map(len, self._seen)) != rows:
            with torch.no_grad():
                self._seen = [self.features(kept.inputs)]
        self.require_auxiliary().learn(torch.cat(self._seen) if rows else None, kept, self.criterion)
        self._seen = []

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return f"layer={self.layer}"


class _Reached(Exception):
    """The layer has run."""


def pooled(output: Tensor) -> Tensor:
    """Pool a layer's output to features.

    Args:
        output: images [B, C, H, W], averaged over a grid of 4 x 4 cells; tokens [B, T, D], averaged over all tokens;
            or anything else [B, ...], flattened.

    Returns:
        Features, [B, F].
    """
    if output.ndim == 4:
        cells = [-(-side // GRID) for side in output.shape[2:]]
        return F.avg_pool2d(output, cells, ceil_mode=True, count_include_pad=False).flatten(1)
    return output.mean(1) if output.ndim == 3 else output.flatten(1)
