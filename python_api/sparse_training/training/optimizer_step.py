"""Optimizer step: gradients accumulated, scaled, clipped and applied, and the weights averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_training.errors import UserError
from sparse_training.selection.types import SelectedBatch
from sparse_training.training.distributed import Ranks
from sparse_training.training.settings import TrainerSettings
from sparse_training.user_code import explained, name_of


class OptimizerStep:
    """Takes one optimizer step on the selected rows of every ``accumulate`` batches, over all ranks.

    Batches have different numbers of selected rows. Their gradients are summed and divided by the number of all these
    rows (or by the sum of the policy's divisors), so that n batches give the gradient of one batch n times as large,
    and so do the batches of n ranks.

    Args:
        model: the model whose weights are averaged.
        optimizer: the optimizer.
        settings: ``accumulate``, ``clip_norm``, ``ema`` and ``amp``.
        device: device of the gradients.
        ranks: the processes that train together, which all call ``add`` and ``skip``; DistributedDataParallel
            averages their gradients. Default: all of torch.distributed's.

    Attributes:
        ema: the averaged model; None without ``ema``.
        scheduler: the caller's learning-rate scheduler, stepped after every optimizer step; None without one.
        defers: True where the ranks exchange gradients in the last batch of an optimizer step alone.
        invalid: number of batches since ``take_invalid`` whose loss was not finite, which are not learned from.
        rejected: True where the last batch was skipped for its loss.
        loss: loss of the last batch that had rows, without gradient, on the device; None before it.
        batches: number of batches since the last step.
        first: divisor of the first of them that had rows; None before it.
        total: sum of the divisors of all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainerSettings,
        *,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.clip_norm, self.accumulate, ema = settings.clip_norm, settings.accumulate, settings.ema
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp_dtype == torch.float16)
        average = None if ema is None else get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]
        with explained(lambda: "`ema` needs a model that copy.deepcopy can copy"):
            self.ema = None if ema is None else AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.ranks = ranks or Ranks()
        self.scheduler: LRScheduler | None = None
        self.invalid: int | Tensor = 0
        self.rejected, self.defers = False, False
        self.loss: Tensor | None = None
        self._local = False  # the gradients of an incomplete step are this rank's
        self._bad: Tensor | None = None  # float32, 1 where a batch since the last step is not finite
        self._shared: Callable[[], Tensor] | None = None  # waits for the rows and divisor of all ranks' batches
        self.batches = 0
        self.first: int | Tensor | None = None
        self.total: int | Tensor = 0

    @property
    def evaluated(self) -> nn.Module:
        """Model to evaluate and keep: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def is_empty(self, kept: SelectedBatch) -> bool:
        """Tell whether no row was selected; False where only the device knows and can skip the step itself."""
        if kept.targets.shape[0] == 0:
            return True
        return isinstance(kept.rows, Tensor) and not self.skips_on_device() and int(kept.rows) == 0  # waits

    def sum_rows(self, kept: SelectedBatch) -> None:
        """Start to sum the ranks' rows; a process alone has nothing to sum.

        An accelerator's forward pass runs meanwhile. On the CPU the sum is waited for, so that a rank that failed is
        noticed here: in a forward pass PyTorch itself may wait for it.
        """
        if not self.ranks.alone:
            divisor = kept.targets.shape[0] if kept.weight is None else kept.divisor
            # The divisor of an empty padded batch is not its number of rows.
            some = torch.as_tensor(kept.rows, device=self.device).double().clamp(max=1)
            own = torch.stack((some, some * divisor))
            self._shared = self.ranks.sum_later(own)
            if self.device.type == "cpu":
                self._shared()

    def add(self, losses: Tensor, kept: SelectedBatch) -> Tensor | None:
        """Add a batch: run the backward pass of its losses, and the optimizer step if the batch completes one.

        A batch whose loss is not finite, on any rank, is counted and skipped. Where only the device knows, the
        optimizer step that it belongs to is skipped instead.

        Returns:
            Whether the batch was invalid, as a bool tensor; None where the host knows that it was not.

        Raises:
            UserError: the losses have no gradient, or the optimizer cannot take the step.
        """
        if not losses.requires_grad:
            raise UserError(
                "the loss must have a gradient in the model's parameters, got one without; a model's output or a loss "
                "is detached somewhere"
            )
        self.rejected = False
        rows: int | Tensor = kept.rows
        divisor = losses.shape[0] if kept.weight is None else kept.divisor
        if self._shared is not None:
            rows, divisor = self._shared().unbind()
            self._shared = None
            divisor = torch.where(rows > 0, divisor, 1.0) / self.ranks.size
            loss = (losses if kept.weight is None else losses * kept.weight).sum() / divisor
        elif kept.weight is None:
            loss = losses.mean()
        else:
            loss = (losses * kept.weight).sum() / divisor
        self.loss = loss.detach()
        if (bad := self._is_invalid(loss)) is not None and not self.skips_on_device():
            self.skip()
            self.rejected = True
            return bad
        if self.first is None:
            self.optimizer.zero_grad(set_to_none=True)
            self.first = divisor
        elif self.accumulate > 1:
            loss = loss * (divisor / self.first)
        # The divisor of an empty padded batch is not its number of rows.
        self.total += torch.where(rows == 0, 0, divisor) if isinstance(rows, Tensor) else divisor
        self._local = self.defers and not self.completes
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.skip()
        return bad

    @property
    def completes(self) -> bool:
        """True where the next batch completes an optimizer step."""
        return self.batches + 1 >= self.accumulate

    def _is_invalid(self, loss: Tensor) -> Tensor | None:
        """Tell whether a batch's loss is not finite on some rank, and count it; None where the host knows it is."""
        bad = (~loss.detach().isfinite()).float().reshape(())
        if not self.ranks.alone:
            bad = self.ranks.sum_later(bad)().clamp(max=1.0)
        if not self.skips_on_device():
            if not bool(bad):
                return None
            self.invalid += 1
        else:
            self.invalid = self.invalid + bad
            self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        return bad > 0

    def take_invalid(self) -> int | Tensor:
        """Return the number of invalid batches since the last call."""
        found, self.invalid = self.invalid, 0
        return found

    def reset(self) -> None:
        """Forget the batches of an incomplete step."""
        self._local, self.loss = False, None
        self.batches, self.first, self.total, self._bad = 0, None, 0, None

    def skip(self) -> None:
        """Count a batch, which may have had no rows; take the optimizer step if the batch completes one."""
        self.batches += 1
        if self.batches >= self.accumulate:
            self.step()

    def step(self) -> None:
        """Take the optimizer step on the rows added since the last one; do nothing if there were none."""
        self.batches = 0
        first, total, bad = self.first, self.total, self._bad
        self.first, self.total, self._bad = None, 0, None
        if first is None:
            return
        if self._local:
            self._average_gradients()
        empty = (total == 0).float().reshape(()) if isinstance(total, Tensor) and self.skips_on_device() else None
        if empty is None and not self.ranks.alone and float(total) == 0.0:  # no rank had a row
            return
        if self.accumulate > 1:
            self.scaler.unscale_(self.optimizer)
            gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            total = torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total
            torch._foreach_mul_(gradients, torch.as_tensor(first / total, device=self.device))
        if self.clip_norm is not None:
            if self.accumulate == 1:
                self.scaler.unscale_(self.optimizer)
            with explained(lambda: f"`clip_norm`={self.clip_norm} cannot clip the gradients"):
                nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        skip = torch.maximum(empty, bad) if empty is not None and bad is not None else bad if empty is None else empty
        with nullcontext() if skip is None else self._skipped_where(skip):
            taken = self._scaled_step()
        if self.scheduler is not None and taken:
            self._step_scheduler(self.scheduler)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _average_gradients(self) -> None:
        """Average the ranks' gradients, of a step whose last batch had none or never came."""
        self._local = False
        parameters = [parameter for parameter in self._parameters() if parameter.requires_grad]
        there = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device)
        for parameter, some in zip(parameters, self.ranks.sum_later(there.int())().tolist(), strict=True):
            if some:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.ranks.sum_later(gradient)() / self.ranks.size

    def _scaled_step(self) -> bool:
        """Take the step, unless the scaler finds that scaled gradients overflowed; tell whether it was taken."""
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        with explained(lambda: f"the optimizer {name_of(self.optimizer)} cannot take a step"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return not self.scaler.is_enabled() or self.scaler.get_scale() >= scale

    def _step_scheduler(self, scheduler: LRScheduler) -> None:
        try:
            scheduler.step()
        except ValueError as error:  # as of OneCycleLR after its last step
            raise UserError(f"`schedule`, a {type(scheduler).__name__}, cannot take this step: {error}") from error

    def _parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def skips_on_device(self) -> bool:
        """Tell whether the device can skip a step, so that the host need not know whether there are rows.

        Fused optimizers change nothing where ``found_inf`` is 1; XLA undoes the step in the same program.
        """
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False) and self.device.type == "cuda"
        return (fused or self.device.type == "xla") and not self.scaler.is_enabled()

    @contextmanager
    def _skipped_where(self, empty: Tensor) -> Iterator[None]:
        """Make the enclosed optimizer step a no-op where ``empty``, float32, is 1."""
        if self.device.type != "xla":
            self.optimizer.found_inf = empty  # type: ignore[attr-defined]
            yield
            del self.optimizer.found_inf  # type: ignore[attr-defined]
            return
        before = {id(tensor): tensor.detach().clone() for tensor in self._changed()}
        yield
        with torch.no_grad():
            for tensor in self._changed():  # a new state starts at 0
                was = before.get(id(tensor))
                tensor.copy_(torch.where(empty > 0, 0.0 if was is None else was, tensor))

    def _changed(self) -> list[Tensor]:
        """Return the tensors on the device that an optimizer step changes."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self._parameters(), *(value for value in states if isinstance(value, Tensor))]
        return [tensor for tensor in tensors if tensor.device.type == self.device.type]  # "xla" is xla:0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, scaler and average, and the gradients of an incomplete step."""
        pending = None
        if self.first is not None:  # the gradients of a step that is not complete
            gradients = [parameter.grad for parameter in self._parameters()]
            pending = {"first": self.first, "total": self.total, "gradients": gradients, "local": self._local}
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "batches": self.batches,
            "pending": pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.reset()
        self.batches = int(state["batches"])
        if (pending := state["pending"]) is not None:
            self.first, self.total = pending["first"], pending["total"]
            self._local = bool(pending.get("local", False))
            self.load_gradients(pending["gradients"])

    def own_gradients(self) -> list[Tensor | None] | None:
        """Return the gradients of an incomplete step, where they are this rank's own; None otherwise."""
        return [parameter.grad for parameter in self._parameters()] if self._local and self.first is not None else None

    def load_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Restore the gradients of an incomplete step."""
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter)
