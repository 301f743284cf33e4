"""A position-wise module whose backward takes only the rows that have a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import compact
from sparse_training.errors import UserError


class DropZeroRows(nn.Module):
    """Runs a position-wise module so that rows without an upstream gradient cost no backward.

    The forward keeps no activations. The backward packs the rows whose upstream gradient is not all zero, runs the
    module on them again, and differentiates those alone: exact whatever made the others zero, such as a mask or an
    advantage of 0. With a share r of such rows it costs 1 + 3r forward passes in place of 3, so it pays below r = 2/3.

    Args:
        module: treats each row alike and alone: rows are all dimensions but the last. It must draw no random numbers
            and change no buffer while it trains: no active dropout, no BatchNorm.

    Attributes:
        rows: rows of the last backward, and how many of them were differentiated: (used, all).

    Raises:
        UserError: in the call, an input that is no floating tensor [..., features], or a module that draws random
            numbers, changes a buffer or does not return a row for each row; in the backward, a second derivative.

    Example:
        >>> block.mlp = DropZeroRows(block.mlp)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise UserError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.rows = (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        """Run the module.

        Args:
            input: floating [..., features].
        """
        if not isinstance(input, Tensor) or input.dim() < 2 or not input.is_floating_point():
            given = (
                f"{input.dtype} of shape {tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            )
            raise UserError(f"DropZeroRows must be given a floating tensor [..., features], got {given}")
        if not torch.is_grad_enabled():
            output: Tensor = self.module(input)
            return output
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        found: Tensor = _DropZeroRows.apply(self, input, *parameters)  # type: ignore[no-untyped-call, unused-ignore]
        return found


class _DropZeroRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: DropZeroRows, input: Tensor, *parameters: Tensor) -> Tensor:
        module = owner.module
        before, drawn = [buffer._version for buffer in module.buffers()], _random_state(input.device)
        with torch.no_grad():
            output = module(input)
        if not torch.equal(drawn, _random_state(input.device)):
            raise UserError("DropZeroRows must be given a module that draws no random numbers; set its dropout to 0")
        if before != [buffer._version for buffer in module.buffers()]:
            raise UserError("DropZeroRows must be given a module that changes no buffer, got one such as BatchNorm")
        if not isinstance(output, Tensor) or output.shape[:-1] != input.shape[:-1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"DropZeroRows must be given a module of [{tuple(input.shape[:-1])}, ...], got {shape}")
        device = input.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.owner = owner
        ctx.save_for_backward(input, *parameters)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UserError("DropZeroRows has no second derivative (create_graph=True); use the module itself")
        input, *parameters = ctx.saved_tensors
        flat = upstream.reshape(-1, upstream.shape[-1])
        selection = compact((flat != 0).any(-1))
        used = selection.index.shape[0]
        ctx.owner.rows = (used, flat.shape[0])
        gradient = torch.zeros_like(input) if ctx.needs_input_grad[1] else None
        if not used:
            return None, gradient, *[torch.zeros_like(parameter) for parameter in parameters]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(input.device.type, dtype=dtype, enabled=enabled):
            rows = input.detach().reshape(-1, input.shape[-1]).index_select(0, selection.index).requires_grad_()
            output = ctx.owner.module(rows)
        found = torch.autograd.grad(
            output, (rows, *parameters), flat.index_select(0, selection.index), allow_unused=True
        )  # fmt: skip
        if gradient is not None and found[0] is not None:
            gradient.view(-1, input.shape[-1]).index_copy_(0, selection.index, found[0])
        return None, gradient, *found[1:]


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the generator that a module on this device draws from."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
