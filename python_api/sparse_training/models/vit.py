"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.models.shapes import Shape

PATCH = 4


class Attention(nn.Module):
    """Self-attention of tokens [B, T, D], every one with every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        mixed: torch.Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    """Attention and a perceptron four times as wide, each after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class Tokens(nn.Module):
    """Images [B, C, H, W] to tokens [B, T, D]: one a patch of 4 x 4 pixels, its place added.

    Places are learned for the size that it is made for, and interpolated for another.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(1, width, shape[1] // PATCH, shape[2] // PATCH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.patches(images)
        places: torch.Tensor = self.places
        if x.shape[2:] != places.shape[2:]:
            places = F.interpolate(places, size=x.shape[2:], mode="bilinear", align_corners=False)
        return (x + places).flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """Tokens [B, T, D] to their mean [B, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def vit(*, shape: Shape, classes: int, width: int = 192, heads: int = 4, depth: int = 2) -> nn.Sequential:
    """A vision transformer (Dosovitskiy et al., 2021) with patches of 4 x 4 pixels, for sides divisible by 4.

    The mean over all tokens is classified. 913,738 parameters for 3x32x32 images and 10 classes.
    """
    if shape[1] % PATCH or shape[2] % PATCH:
        raise UserError(f"model vit cuts images into {PATCH}x{PATCH} pixels: wanted such sides, got {shape[1:]}")
    return nn.Sequential(
        Tokens(shape, width),
        *[Block(width, heads) for _ in range(depth)],
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, classes),
    )
