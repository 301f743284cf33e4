"""ViT-S/16, for images of ImageNet's size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.models.shapes import Shape
from sparse_training.models.vit import Block

PATCH, WIDTH, HEADS, DEPTH = 16, 384, 6, 12


class PatchTokens(nn.Module):
    """Maps images [B, C, H, W] to tokens [B, 1 + T, D]: a class token, and one per patch of 16 x 16 pixels.

    Position embeddings are learned for the size that the model is built for, and interpolated for another.

    Args:
        shape: (C, H, W) of one image, H and W divisible by 16.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.grid = shape[1] // PATCH, shape[2] // PATCH
        self.patches = nn.Conv2d(shape[0], WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], WIDTH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.patches(images)
        first, others = self.places[:, :1], self.places[:, 1:]
        if tuple(x.shape[2:]) != self.grid:
            planes = others.transpose(1, 2).reshape(1, WIDTH, *self.grid)
            planes = F.interpolate(planes, size=x.shape[2:], mode="bicubic", align_corners=False)
            others = planes.flatten(2).transpose(1, 2)
        tokens = x.flatten(2).transpose(1, 2) + others
        return torch.cat(((self.class_token + first).expand(len(x), -1, -1), tokens), 1)


class First(nn.Module):
    """Maps tokens [B, T, D] to the first of them, [B, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


def vit_s(*, shape: Shape, classes: int) -> nn.Sequential:
    """ViT-S/16 (Touvron et al., 2021), which classifies a class token; for sides divisible by 16.

    22,050,664 parameters for 3x224x224 images and 1,000 classes.

    Args:
        shape: (C, H, W) of one image, H and W divisible by 16.
        classes: number of classes.

    Returns:
        A model that maps images [N, C, H, W] to logits [N, classes].

    Raises:
        UserError: a side that is not divisible by 16.
    """
    if shape[1] % PATCH or shape[2] % PATCH:
        raise UserError(
            f"the model vit-s cuts images into {PATCH}x{PATCH} pixels; their sides must be divisible by {PATCH}, "
            f"got {shape[1:]}"
        )
    return nn.Sequential(
        PatchTokens(shape),
        *[Block(WIDTH, HEADS) for _ in range(DEPTH)],
        nn.LayerNorm(WIDTH),
        First(),
        nn.Linear(WIDTH, classes),
    )
