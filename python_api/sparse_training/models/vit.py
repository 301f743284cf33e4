"""A small vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.models.shapes import Shape
from sparse_training.nn import BlockSparseAttention


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
        attention: maker of the attention from ``width`` and ``heads``. Default ``Attention``.
    """

    def __init__(self, width: int, heads: int, attention: Callable[[int, int], nn.Module] = Attention) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class Tokens(nn.Module):
    """Maps images [B, C, H, W] to tokens [B, T, D]: one per square patch, with its position embedding.

    Position embeddings are learned for the size that the model is built for, and interpolated for another.

    Args:
        shape: (C, H, W) of one image, H and W divisible by ``patch``.
        width: features of a token.
        patch: side of a patch in pixels. Default 4.
    """

    def __init__(self, shape: Shape, width: int, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, width, shape[1] // patch, shape[2] // patch))

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


def vit(
    *,
    shape: Shape,
    classes: int,
    width: int = 192,
    heads: int = 4,
    depth: int = 2,
    patch: int = 4,
    attention: str = "dense",
    block: int = 64,
) -> nn.Sequential:
    """Vision transformer (Dosovitskiy et al., 2021), which classifies the mean over all tokens.

    913,738 parameters for 3x32x32 images and 10 classes. Both kinds of attention have the same parameters.

    Args:
        shape: (C, H, W) of one image, H and W divisible by ``patch``.
        classes: number of classes.
        width: features of a token, divisible by ``heads``. Default 192.
        heads: attention heads. Default 4.
        depth: number of blocks. Default 2.
        patch: side of the square patches in pixels, each of which is a token; at least 1. Default 4.
        attention: "dense" (the default), or "sparse" for ``sparse_training.nn.BlockSparseAttention``.
        block: tokens of a block of sparse attention, at least 1. Default 64.

    Returns:
        A model that maps images [N, C, H, W] to logits [N, classes].

    Raises:
        UserError: a side that is not divisible by ``patch``, or an unknown kind of attention.
    """
    if patch < 1 or shape[1] % patch or shape[2] % patch:
        raise UserError(
            f"the model vit cuts images into {patch}x{patch} pixels; their sides must be divisible by {patch}, "
            f"got {shape[1:]}"
        )
    makers: dict[str, Callable[[int, int], nn.Module]] = {
        "dense": Attention,
        "sparse": partial(BlockSparseAttention, block=block),
    }
    if attention not in makers:
        raise UserError(f"`attention` must be one of {', '.join(makers)}, got {attention!r}")
    return nn.Sequential(
        Tokens(shape, width, patch),
        *[Block(width, heads, makers[attention]) for _ in range(depth)],
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, classes),
    )


def vit_sparse(*, shape: Shape, classes: int) -> nn.Sequential:
    """Vision transformer with a token for every pixel and sparse attention in blocks of 32 tokens.

    A token attends to 256 others. Images of fewer than 512 pixels are served by dense attention.

    Args:
        shape: (C, H, W) of one image.
        classes: number of classes.

    Returns:
        A model that maps images [N, C, H, W] to logits [N, classes].
    """
    return vit(shape=shape, classes=classes, heads=3, patch=1, attention="sparse", block=32)
