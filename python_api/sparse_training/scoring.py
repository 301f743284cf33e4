"""What scores rows: the interface of the scorers, and the model itself as one (the others: scorers.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.loader import Batch

if TYPE_CHECKING:
    from sparse_training.policies import Kept

Criterion = Callable[[Any, Any], Tensor]  # logits, targets -> one loss a row, [B]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def evaluation_statistics(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Submodules of ``kind`` as they are in evaluation, each one's own training flag back afterwards.

    BatchNorm then reads its running statistics and leaves them alone, and dropout draws nothing. Flags
    are set directly, not through ``eval()``: a submodule frozen by hand must be frozen afterwards too.
    """
    live = [module for module in model.modules() if module.training and isinstance(module, kind)]
    for module in live:
        module.training = False
    try:
        yield
    finally:
        for module in live:
            module.training = True


def scoring_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for a precision by name, None for the model's own.

    "auto" is bfloat16 where the hardware multiplies it natively: emulated, it is slower than float32.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if precision != "auto":
        raise UserError(f"precision {precision!r}: wanted auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    else:
        fast = False
    return torch.bfloat16 if fast else None


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits for inputs of any structure, from an output that is a tensor or has ``logits``."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


class Scores:
    """What a scorer says of a batch's rows.

    Attributes:
        logits: the scorer's, without gradient, as ``criterion`` takes them; None where it has losses alone.
        targets: [B, ...], the batch's; None before the batch is loaded.
        criterion: maps them to one loss a row.
        offset: float32 [B], to be added to each row's loss; None for nothing.
    """

    def __init__(
        self,
        targets: Tensor | None,
        criterion: Criterion,
        *,
        logits: Any = None,
        losses: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.targets, self.logits, self.offset = targets, logits, offset
        self.criterion, self._losses = criterion, losses

    @property
    def losses(self) -> Tensor:
        """float32 [B]: each row's loss, with the offset."""
        if self._losses is None:
            with torch.no_grad():
                logits = self.logits.float() if isinstance(self.logits, Tensor) else self.logits
                self._losses = self.criterion(logits, self.targets).float()
        return self._losses if self.offset is None else self._losses + self.offset


class Scorer(nn.Module):
    """What the rows of a batch are judged by. To add one, subclass it and override ``logits`` or ``forward``.

    A policy owns its scorer; the trainer attaches it to the model before the first step.

    Attributes:
        name: as in ``SparseTrainer(scorer=...)``.
        before_loading: it needs row numbers alone (``recall``), so that rows left out are never loaded.
        dtype: of autocast in the scoring pass, None for the model's own.
    """

    name = "scorer"
    before_loading = False
    dtype: torch.dtype | None = None

    def __init__(self, *, precision: str | None = None) -> None:
        super().__init__()
        self.precision = precision
        if precision is not None:
            scoring_dtype(precision, torch.device("cpu"))  # refuses a name that there is not
        self.device = torch.device("cpu")
        self._attached: tuple[nn.Module, Criterion] | None = None  # in a tuple: not a part of the scorer's state

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[0]

    @property
    def criterion(self) -> Criterion:
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[1]

    def attach(self, model: nn.Module, criterion: Criterion, *, device: torch.device, precision: str = "auto") -> None:
        """Told what is trained, on what loss and where; ``precision`` is for scorers made without one."""
        self._attached, self.device = (model, criterion), device
        self.dtype = scoring_dtype(self.precision or precision, device)

    def prepare(self, rows: int | None) -> None:
        """Told before a run how many rows the data set has; None where none can be had by its number."""

    def build(self, batch: Batch, logits: Any) -> None:
        """Told the first batch and the model's logits of it, for what hangs on their shapes; every time a run starts.

        Raises:
            UserError: the scorer cannot score such a batch.
        """

    def logits(self, inputs: Any) -> Any:
        """Class logits of the inputs; called by ``forward`` without gradient and under autocast."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Scores:
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.logits(batch.inputs)
        return Scores(batch.targets, self.criterion, logits=logits)

    def recall(self, ids: Tensor) -> Scores:
        """What is known of rows by their numbers, int64 [B]; where ``before_loading``."""
        raise NotImplementedError

    def watch(self) -> AbstractContextManager[None]:
        """Entered around the training forward, for what reads the model's layers in passing."""
        return nullcontext()

    def learn(self, kept: Kept) -> None:
        """Train what is trained beside the model, on the rows that the model was just trained on.

        Of several processes all call it in every step, one that kept none of its rows with no row, or with padding.
        """

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        """The losses, [n], of the rows just trained on, of the dense phases too; where rows have numbers."""

    def set_learning_rate(self, factor: float) -> None:
        """What the learning rate of anything trained beside is a multiple of, as the model's is."""

    def extra_repr(self) -> str:
        return f"precision={self.precision}" if self.precision else ""


class SelfScorer(Scorer):
    """The model itself: no gradient, evaluation statistics, every buffer and generator untouched.

    Args:
        precision: of the pass; None for the trainer's.
        resolution: scale of the images that are scored, in (0, 1): pooled by area, for a model that takes images of
            any size. None for the images as they are.

    Raises:
        UserError: a setting out of range; with ``build``, inputs that are not images, or too small for the model.
    """

    name = "self"

    def __init__(self, *, precision: str | None = None, resolution: float | None = None) -> None:
        super().__init__(precision=precision)
        if resolution is not None and not 0.0 < resolution < 1.0:
            raise UserError(f"resolution {resolution}: wanted a scale above 0 and below 1, or None")
        self.resolution = resolution

    def logits(self, inputs: Any) -> Any:
        if self.resolution is not None:
            inputs = self._reduced(inputs)
        with evaluation_statistics(self.model):
            return forward(self.model, inputs)

    def build(self, batch: Batch, logits: Any) -> None:
        if self.resolution is None:
            return
        reduced = self._reduced(batch.inputs)
        try:
            self(batch)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"resolution {self.resolution}: the model takes no images of {list(reduced.shape[2:])} pixels: "
                f"{str(error).splitlines()[0]}"
            ) from None

    def _reduced(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            shape = f"shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else f"type {type(inputs).__name__}"
            raise UserError(f"resolution {self.resolution} with inputs of {shape}: wanted images, float [B, C, H, W]")
        assert self.resolution is not None
        size = [max(1, round(self.resolution * side)) for side in inputs.shape[2:]]
        return F.interpolate(inputs, size=size, mode="area")

    def extra_repr(self) -> str:
        return super().extra_repr() if self.resolution is None else f"resolution={self.resolution}"
