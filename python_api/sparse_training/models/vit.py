"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.models.shapes import Shape

PATCH = 4


class Attention(nn.Module):
    """Self-attention of tokens [B, T, D], without a mask.

    Args:
        width: features D of a token, divisible by ``heads``.
        heads: number of attention heads.
    """

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
    """Attention and a perceptron four times as wide, each after a LayerNorm and with a shortcut around it.

    Args:
        width: features of a token, divisible by ``heads``.
        heads: number of attention heads.
    """

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
    """Maps images [B, C, H, W] to tokens [B, T, D]: one per patch of 4 x 4 pixels, with its position embedding.

    Position embeddings are learned for the size that the model is built for, and interpolated for another.

    Args:
        shape: (C, H, W) of one image, H and W divisible by 4.
        width: features of a token.
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
    """Maps tokens [B, T, D] to their mean [B, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def vit(*, shape: Shape, classes: int, width: int = 192, heads: int = 4, depth: int = 2) -> nn.Sequential:
    """Vision transformer (Dosovitskiy et al., 2021) with patches of 4 x 4 pixels, for sides divisible by 4.

    It classifies the mean over all tokens. 913,738 parameters for 3x32x32 images and 10 classes.

    Args:
        shape: (C, H, W) of one image, H and W divisible by 4.
        classes: number of classes.
        width: features of a token, divisible by ``heads``. Default 192.
        heads: attention heads. Default 4.
        depth: number of blocks. Default 2.

    Returns:
        A model that maps images [N, C, H, W] to logits [N, classes].

    Raises:
        UserError: a side that is not divisible by 4.
    """
    if shape[1] % PATCH or shape[2] % PATCH:
        raise UserError(
            f"the model vit cuts images into {PATCH}x{PATCH} pixels; their sides must be divisible by {PATCH}, "
            f"got {shape[1:]}"
        )
    return nn.Sequential(
        Tokens(shape, width),
        *[Block(width, heads) for _ in range(depth)],
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, classes),
    )
