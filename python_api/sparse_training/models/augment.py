"""Random shifts and reflections of images, as a model's first layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training.arguments import check_integer
from sparse_training.errors import UserError


class RandomShiftFlip(nn.Module):
    """Shift and reflect each image at random in training; the identity in evaluation.

    As a layer it serves every loader, and its draws are of PyTorch's global generator, which checkpoints keep.

    Args:
        shift: largest shift in pixels, each way, at least 0; what comes in is 0. Default 2.
        flip: True to reflect half of the images left to right. Default True.

    Raises:
        UserError: a negative shift.

    Example:
        >>> model = nn.Sequential(RandomShiftFlip(), build_model("cnn-bn", shape=(1, 28, 28), classes=10))
    """

    def __init__(self, shift: int = 2, flip: bool = True) -> None:
        super().__init__()
        self.shift, self.flip = check_integer("shift", shift, 0), flip

    def forward(self, images: Tensor) -> Tensor:
        """Return images of the same shape, float [N, C, H, W]."""
        if not self.training:
            return images
        rows, _, height, width = images.shape
        device = images.device
        across = torch.arange(width, device=device).expand(rows, width)
        if self.flip:
            across = torch.where(torch.rand(rows, 1, device=device) < 0.5, across, across.flip(1))
        moves = torch.randint(0, 2 * self.shift + 1, (2, rows, 1), device=device)
        padded = F.pad(images, (self.shift,) * 4)
        down = torch.arange(height, device=device) + moves[0]
        row = torch.arange(rows, device=device)[:, None, None]
        # Indices around the channels' slice put the channels last; they go back to their place.
        return padded[row, :, down[:, :, None], (across + moves[1])[:, None, :]].permute(0, 3, 1, 2).contiguous()


def read_augmentation(text: str) -> RandomShiftFlip:
    """Make the layer that a text names.

    Args:
        text: "flip", "shift" (by up to 2 pixels) or "shift:PIXELS", or two of them with a comma between.

    Raises:
        UserError: a text of another form.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, pixels = part.strip().partition(":")
        valid = not pixels if name == "flip" else name == "shift" and (not pixels or pixels.isdecimal())
        if not valid or name in found:
            raise UserError(f"augmentation must be flip, shift or shift:PIXELS, or two with a comma, got {text!r}")
        found[name] = int(pixels or 2)
    return RandomShiftFlip(shift=found.get("shift", 0), flip="flip" in found)


def augment_inputs(model: nn.Module, augmentation: nn.Module) -> None:
    """Let a model in training see its first input through a layer; its ``state_dict`` stays as it is.

    Args:
        model: the model.
        augmentation: a layer without parameters, such as ``RandomShiftFlip``.
    """

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (augmentation(inputs[0]), *inputs[1:]) if module.training else None

    model.register_forward_pre_hook(before)
