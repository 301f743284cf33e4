"""Embeddings of the rows, read from the model during a forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sparse_training.errors import UserError


class EmbeddingReader:
    """Context in which a model's forward pass leaves an embedding of each sample, or of each token or pixel.

    Args:
        model: the model.
        name: name of the submodule whose output embeds a row; None for the input of the last linear layer or, where
            rows are tokens or pixels, of the last linear or convolutional one.
        elements: True where rows are tokens or pixels. Default False.

    Raises:
        UserError: there is no such submodule or layer, or it is compiled; at the pass, an output of another form.
    """

    def __init__(self, model: nn.Module, name: str | None, *, elements: bool = False) -> None:
        self._value: Tensor | None = None  # [B, width, ...]
        self.name = name
        modules = dict(model.named_modules())
        kinds, kind = ((nn.Linear, _ConvNd), "linear or convolutional") if elements else ((nn.Linear,), "linear")
        layers = [each for each, module in modules.items() if isinstance(module, kinds)]
        if name is None and not layers:
            raise UserError(f"the model has no {kind} layer whose input embeds a row; name a submodule by `embedding`")
        if name is not None and name not in modules:
            raise UserError(
                f"`embedding` must name a submodule of the model, such as {next(reversed(modules))!r}, got {name!r}"
            )
        place = layers[-1] if name is None else name
        self.module = modules[place]
        around = [modules[each] for each in modules if each in ("", place) or place.startswith(f"{each}.")]
        if any(module._compiled_call_impl is not None for module in around):
            raise UserError(f"a term reads the embedding {place!r}, which a compiled model hides; use compile=False")

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
        channels_first = isinstance(self.module, (_ConvNd, _NormBase)) or value.ndim > 3
        if isinstance(self.module, nn.Linear) or not channels_first:
            value = value.movedim(-1, 1)
        self._value = value.detach()

    def of_samples(self) -> Tensor | None:
        """Embeddings of the samples, float [B, width], means over tokens or pixels; None before the pass."""
        if self._value is None or self._value.ndim == 2:
            return self._value
        return self._value.flatten(2).mean(2)

    def of_elements(self, targets: Tensor, *, shift: bool) -> Tensor | None:
        """Embeddings of the tokens or pixels, in the order of the targets.

        A pixel of a coarser map takes the embedding of its cell.

        Args:
            targets: targets of the batch, [B, ...].
            shift: True if each token's output predicts the next token's target.

        Returns:
            Embeddings, float [N, width]; None before the pass.

        Raises:
            UserError: the embeddings fit the targets in no way.
        """
        value, places = self._value, targets.shape[1:]
        if value is None:
            return None
        if value.ndim == 2 and value.shape[0] == targets.numel():  # of a model that flattens its tokens itself
            value = value.reshape(*targets.shape, value.shape[1]).movedim(-1, 1)
        if value.shape[0] == targets.shape[0] and not places and value.ndim > 2:
            value = value.flatten(2).mean(2)
        elif value.shape[0] == targets.shape[0] and value.shape[2:].numel() == places.numel():
            value = value.reshape(*value.shape[:2], *places)
        elif value.shape[0] == targets.shape[0] and value.ndim - 2 == len(places) > 1:
            value = F.interpolate(value, size=places)
        else:
            found = [value.shape[0], *value.shape[2:]]
            raise UserError(
                f"an embedding of {value.shape[1]} numbers at {found} does not fit targets {list(targets.shape)}; "
                "name a submodule with one for each target by `embedding`"
            )
        if shift and places:
            value = value[:, :, :-1]
        return value.movedim(1, -1).reshape(-1, value.shape[1])
