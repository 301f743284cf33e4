"""Embeddings of the rows, read from the model while it scores them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_training.errors import UserError


class EmbeddingReader:
    """Context in which a model's forward pass leaves an embedding of each row.

    Args:
        model: the model.
        name: name of the submodule whose output embeds a row; None for the input of the last linear layer.

    Attributes:
        embedding: float [rows, width], means over tokens or pixels; None before the pass.

    Raises:
        UserError: there is no such submodule, or no linear layer; at the pass, an output of another form.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self.embedding: Tensor | None = None
        self.name = name
        modules = dict(model.named_modules())
        linear = [each for each, module in modules.items() if isinstance(module, nn.Linear)]
        if name is None and not linear:
            raise UserError("the model has no linear layer whose input embeds a row; name a submodule by `embedding`")
        if name is not None and name not in modules:
            raise UserError(
                f"`embedding` must name a submodule of the model, such as {next(reversed(modules))!r}, got {name!r}"
            )
        self.module = modules[linear[-1] if name is None else name]

    def __enter__(self) -> EmbeddingReader:
        if self.name is None:
            self._hook = self.module.register_forward_pre_hook(lambda _, inputs: self._read(inputs[0]))
        else:
            self._hook = self.module.register_forward_hook(lambda _, __, output: self._read(output))
        return self

    def __exit__(self, *details: Any) -> None:
        self._hook.remove()

    def _read(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise UserError(
                f"an embedding must be float [rows, width, ...], got {shape}; name a submodule by `embedding`"
            )
        if value.ndim == 3:  # tokens
            value = value.mean(1)
        elif value.ndim > 3:  # pixels, behind the channels
            value = value.flatten(2).mean(2)
        self.embedding = value.detach()
