"""The interface of terms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.errors import UserError
from sparse_training.gate.schedules import Weight, schedule_name
from sparse_training.gate.terms.context import Context

MEMORY = 0.99  # of a running scale: it forgets within some hundred batches


class Term(nn.Module):
    """One term of a significance: a number for each row, computed for the whole batch on its device.

    To add a term, subclass it and override ``forward``. State belongs in buffers, so that it moves with the gate and
    resumes exactly. A gate works on a copy of its own.

    Args:
        weight: factor of the term's values; finite, other than 0. Negative ranks rows down. A callable of the fraction
            of the run that is done, such as ``Transition(-0.25, 0.25)``, is a curriculum. Default 1.

    Attributes:
        statistics: names of the logits' statistics that it asks for, as in ``sparse_kernels.row_stats``.
        needs: fields of ``Context`` that must not be None, of "index", "inputs" and "embedding".
        takes_feedback: True if it reads ``feedback`` where a batch has it; a gate without such a term refuses feedback.
        embedding: name of the submodule whose output it needs as an embedding; None for the default one.
        per_process: True if its state is of one process's rows, so that processes cannot share its gate.
        row_buffers: names of the buffers that hold a value for each row of the data set, NaN for none.

    Raises:
        UserError: the weight is not a finite number other than 0, nor a callable.

    Example:
        >>> class Brightness(Term):
        ...     needs = ("inputs",)
        ...
        ...     def forward(self, context):
        ...         return context.inputs.flatten(1).mean(1)
        >>> gate = Gate(rate=0.1, significance=Significance(loss=0.7, terms=(Brightness(0.3),)))
    """

    statistics: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    takes_feedback = False
    per_process = False
    row_buffers: tuple[str, ...] = ()
    embedding: str | None = None

    def __init__(self, weight: float | Weight = 1.0) -> None:
        super().__init__()
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (callable(weight) or (number and math.isfinite(weight) and weight)):
            raise UserError(
                f"the weight of the term {type(self).__name__} must be a finite number other than 0, or a schedule, "
                f"got {weight!r}"
            )
        self.weight = weight

    def prepare(self, rows: int | None) -> None:
        """Called before each run of a trainer, to allocate what depends on the data set.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
        """

    def check(self, context: Context) -> None:
        """Called with each batch before any term changes.

        Args:
            context: the batch.

        Raises:
            UserError: the term cannot serve it.
        """
        for name in self.statistics:
            context.statistic(name, self)

    def forward(self, context: Context) -> Tensor:
        """Compute the term's value of each row, and take the batch into its state.

        Args:
            context: the batch.

        Returns:
            Values, float [rows], about 0 to 1. NaN is never selected.
        """
        raise NotImplementedError

    def resize(self, name: str, *shape: int, device: torch.device) -> None:
        """Give an empty buffer its shape, filled with zeros, at the first batch.

        Args:
            name: the buffer's name.
            shape: its shape.
            device: the batch's device.
        """
        setattr(self, name, torch.zeros(shape, dtype=getattr(self, name).dtype, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor) and buffer.numel() == 0 and buffer.shape != saved.shape:
                self.resize(name, *saved.shape, device=buffer.device)  # it gets its shape with its first batch
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return f"weight={schedule_name(self.weight)}"


class ScaledTerm(Term):
    """A term that is a magnitude x, at least 0, on its own running scale: x / (x + running mean of x).

    That is 0 at 0, one half at the mean, and below 1 for any x: a clip at 1 would make the most significant rows equal,
    and a gate that keeps few rows could not choose among them.

    Args:
        weight: as for ``Term``.
    """

    mean: Tensor
    seen: Tensor

    def __init__(self, weight: float | Weight = 1.0) -> None:
        super().__init__(weight)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def magnitude(self, context: Context) -> Tensor:
        """The magnitude of each row, float [rows], at least 0; +inf where it is unknown, which counts as the mean."""
        raise NotImplementedError

    def forward(self, context: Context) -> Tensor:
        """Compute the scaled magnitudes, and move the scale."""
        values = self.magnitude(context)
        mean, count = context.mean(values)
        keep = torch.where(self.seen > 0, MEMORY, 0.0)  # the first batch sets the scale
        has = count > 0
        self.mean.copy_(torch.where(has, keep * self.mean + (1.0 - keep) * mean, self.mean))
        self.seen.add_(has)
        scaled = values / (values + self.mean).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(values == torch.inf, 0.5, scaled)
