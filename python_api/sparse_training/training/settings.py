"""Settings of the training step that most runs leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_training.arguments import check_choice, check_integer, check_number
from sparse_training.errors import UserError
from sparse_training.precision import PRECISIONS


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the computation of a step: precision, accumulation, compilation, structure of batches.

    Example:
        >>> SparseTrainer(model, settings=TrainerSettings(amp="bfloat16", accumulate=4, clip_norm=1.0))

    Args:
        accumulate: number of batches whose rows make one optimizer step, at least 1. Default 1.
        clip_norm: largest norm of the whole gradient, above 0; None for no clipping. Default None.
        ema: decay of an exponential moving average of the weights, in (0, 1), such as 0.999; the average is what is
            evaluated. None for no average. Default None.
        amp: autocast type of training: "bfloat16", "float16" (with a gradient scaler) or "float32"; None for the
            model's own. Default None.
        scoring_precision: autocast type of the scoring pass: "auto" (bfloat16 where the hardware multiplies it),
            "float32", "bfloat16" or "float16". Default "auto".
        compile: True to ``torch.compile`` the model, once for all numbers of rows; or the name of a backend of
            torch.compile. Default False.
        channels_last: True for the channels-last memory format of convolutional weights; None for True where the
            model has a Conv2d. Default None.
        inputs: function from a batch to the model's inputs, for batches that are neither (inputs, targets) nor a
            mapping. Default None.
        targets: function from a batch to its targets, likewise. Default None.

    Raises:
        UserError: a value out of range.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    amp: str | None = None
    scoring_precision: str = "auto"
    compile: bool | str = False
    channels_last: bool | None = None
    inputs: Callable[[Any], Any] | None = None
    targets: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, "above 0, or None", lambda x: x > 0.0)
        check_integer("accumulate", self.accumulate, 1)
        check_choice("scoring_precision", self.scoring_precision, ("auto", *PRECISIONS))
        if self.ema is not None:
            check_number("ema", self.ema, "a decay in (0, 1), or None", lambda x: 0.0 < x < 1.0)
        if not isinstance(self.compile, bool | str):
            raise UserError(f"`compile` must be True, False or the name of a backend, got {self.compile!r}")
        if self.channels_last not in (None, True, False):
            raise UserError(f"`channels_last` must be True, False or None, got {self.channels_last!r}")
        for name in ("inputs", "targets"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise UserError(f"`{name}` must be a function of a batch, or None, got {getattr(self, name)!r}")
        if self.amp is not None and self.amp not in PRECISIONS:
            raise UserError(f"`amp` must be None or one of {', '.join(PRECISIONS)}, got {self.amp!r}")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Autocast type of training; None for the model's own."""
        return None if self.amp is None else PRECISIONS[self.amp]
