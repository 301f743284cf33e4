"""Batch normalisation that leaves the padding of packed rows out of its statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_kernels import Selection


class BatchNorm(nn.modules.batchnorm._NormBase):
    """Batch normalisation of packed rows that leaves padding out of the statistics, for any number of dimensions.

    It has the same parameters, buffers and results as ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` on the kept rows
    alone, so a ``state_dict`` fits both. Nothing waits for the device. Padding is normalised as the other rows are.
    Where no row is kept, or one with a single value per channel, the running statistics stay as they are.

    Args:
        num_features: number of channels, at least 1.
        eps: number added to the variance. Default 1e-5.
        momentum: weight of a batch in the running statistics; None for a cumulative average. Default 0.1.
        affine: learn a scale and a shift per channel. Default True.
        track_running_stats: keep running statistics for evaluation. Default True.
        device: device of parameters and buffers; None (the default) for PyTorch's default.
        dtype: dtype of parameters and buffers; None (the default) for PyTorch's default.
    """

    def forward(self, rows: Tensor, selection: Selection) -> Tensor:
        """Normalise the rows.

        Args:
            rows: packed rows, [slots, channels, ...].
            selection: selection of the packed rows, from ``Compact``.

        Returns:
            The normalised rows, of the same shape and dtype.

        Raises:
            ValueError: the rows do not fit the selection or the channels.
        """
        slots = selection.index.shape[0]
        if rows.dim() < 2 or rows.shape[:2] != (slots, self.num_features):
            raise ValueError(
                f"`rows` must have shape [{slots}, {self.num_features}, ...], {slots} slots of the selection and "
                f"{self.num_features} channels, got {tuple(rows.shape)}"
            )
        channels = (1, -1, *[1] * (rows.dim() - 2))
        x = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if self.training or self.running_mean is None or self.running_var is None:
            mean, var = self._statistics(x, selection)
        else:
            mean, var = self.running_mean, self.running_var
        scale = torch.rsqrt(var + self.eps)
        x = (x - mean.reshape(channels)) * scale.reshape(channels)
        if self.affine:
            x = x * self.weight.reshape(channels) + self.bias.reshape(channels)
        return x.to(rows.dtype)

    def _statistics(self, x: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the kept rows, [channels]; updates the running statistics in training."""
        dims = [0, *range(2, x.dim())]
        valid = selection.valid().reshape(-1, *[1] * (x.dim() - 1))
        values = selection.count * (x[0, 0].numel() if x.shape[0] else 0)  # per channel
        total = values.clamp(min=1).to(x.dtype)
        # where, not a product: padding may be NaN or infinite, and 0 * inf is NaN.
        mean = torch.where(valid, x, 0.0).sum(dims) / total
        centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
        var = torch.where(valid, centred, 0.0).square().sum(dims) / total
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                enough = values > 1
                self.num_batches_tracked += enough
                share = 1.0 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
                share = torch.where(enough, share, 0.0)
                unbiased = var * (total / (total - 1).clamp(min=1))
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running += share * (new - running)
        return mean, var
