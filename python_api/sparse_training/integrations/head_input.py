"""The input of a language model's head, handed to its loss in place of the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_training.errors import UserError
from sparse_training.integrations.switch import Switch


class HeadInput(Switch):
    """Makes a model's head return its input while ``active``, so that no logits are made.

    The model hands on what its head returns: the loss function gets hidden states. A model that changes its logits, by
    a softcap or a scale, would change these, so it is refused: what arrives must be the very tensor that the head got.

    Args:
        model: a model of Transformers with output embeddings.

    Attributes:
        active: True while the head leaves its product out. Default False.

    Raises:
        UserError: a head that is not an ``nn.Linear`` as it was made.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(f"fused_head=True needs a head that is an nn.Linear, got {type(head).__name__}")
        self._name, self._head, self.active = type(model).__name__, head, False
        self._input: Tensor | None = None

    def _turn_on(self) -> None:
        if "forward" in vars(self._head):
            raise UserError("fused_head=True needs a head whose forward is nn.Linear's, got one that was replaced")
        self._head.forward = self._forward  # type: ignore[method-assign]

    def _turn_off(self) -> None:
        del self._head.forward
        self._input, self.active = None, False

    def _forward(self, input: Tensor) -> Tensor:
        self._input = input if self.active else None
        return input if self.active else nn.Linear.forward(self._head, input)

    def parameters_for(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias for the head's input.

        Args:
            scores: what the model hands on as its logits.

        Raises:
            UserError: it is not the head's input.
        """
        if scores is not self._input:
            raise UserError(f"{self._name} changes its logits after the head: it is served with fused_head=False")
        return self._head.weight, self._head.bias

    def left_out_of(self, output: Any) -> Any:
        """Return a model's output without the head's input where logits are expected.

        Args:
            output: a ``ModelOutput`` or a tuple.
        """
        hidden, self._input, self.active = self._input, None, False
        if hidden is None:
            return output
        if isinstance(output, tuple):
            return tuple(None if value is hidden else value for value in output)
        return type(output)(**{name: value for name, value in output.items() if value is not hidden})
