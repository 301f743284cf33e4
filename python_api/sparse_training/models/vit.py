"""A small vision transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.arguments import check_integer
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

    Position embeddings are learned for the size that the model is built for, and interpolated for another. They begin
    as sines and cosines of row and column, from a period of two images down to one of two patches.

    Args:
        shape: (C, H, W) of one image, H and W divisible by ``patch``.
        width: features of a token.
        patch: side of a patch in pixels. Default 4.
        tile: rows and columns of patches of a tile; the tokens of a tile follow one another, and so do neighbouring
            tiles. None (the default) for row by row.
    """

    order: torch.Tensor | None

    def __init__(self, shape: Shape, width: int, patch: int = 4, tile: tuple[int, int] | None = None) -> None:
        super().__init__()
        rows, columns = shape[1] // patch, shape[2] // patch
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.places = nn.Parameter(waves(width, rows, columns))
        self.tile = tile
        self.register_buffer("order", None if tile is None else tile_order(rows, columns, tile), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.patches(images)
        places: torch.Tensor = self.places
        if x.shape[2:] != places.shape[2:]:
            places = F.interpolate(places, size=x.shape[2:], mode="bilinear", align_corners=False)
        tokens = (x + places).flatten(2).transpose(1, 2)
        if self.tile is None:
            return tokens
        order = self.order
        if order is None or places is not self.places:
            order = tile_order(x.shape[2], x.shape[3], self.tile, device=x.device)
        return tokens.index_select(1, order)


def waves(width: int, rows: int, columns: int) -> torch.Tensor:
    """Return sines and cosines of row and column, [1, width, rows, columns]; 0 in what is left of a quarter."""
    found = torch.zeros(1, width, rows, columns)
    quarter = width // 4
    for part, (side, shape) in enumerate(((rows, (-1, 1)), (columns, (1, -1)))):
        angle = torch.pi * torch.arange(side) / side  # half a period over the image
        for number in range(quarter):
            phase = (angle * side ** (number / max(1, quarter - 1))).view(shape).expand(rows, columns)
            found[0, (2 * part) * quarter + number] = 0.5 * phase.sin()
            found[0, (2 * part + 1) * quarter + number] = 0.5 * phase.cos()
    return found


def tile_of(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Return rows and columns of the most square tile of three quarters of a block to a block that divides an image.

    Where there is none whose longer side is at most four times the shorter, the tile leaves a rest at the edges.

    Args:
        rows: rows of patches of the image.
        columns: columns of patches.
        block: tokens of a block of sparse attention, at least 1.
    """
    least = 0.75 * min(block, rows * columns)
    sides = [
        (height, width)
        for height in range(1, min(rows, block) + 1)
        for width in range(1, min(columns, block // height) + 1)
        if rows % height == columns % width == 0
    ]
    shapes = [(max(tile) / min(tile), -tile[0] * tile[1], tile[0]) for tile in sides]
    fitting = [(shape, area, height) for shape, area, height in shapes if shape <= 4 and -area >= least]
    if not fitting:
        return math.isqrt(block), block // math.isqrt(block)
    _, area, height = min(fitting)
    return height, -area // height


def tile_order(
    rows: int, columns: int, tile: tuple[int, int], *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the patches' numbers, row by row, in the order of tiles, int64 [rows * columns]; every other row of tiles
    runs backwards."""
    row, column = torch.arange(rows, device=device).unsqueeze(1), torch.arange(columns, device=device)
    above, left = row // tile[0], column // tile[1]
    across = -(-columns // tile[1])
    left = torch.where(above % 2 == 0, left, across - 1 - left)
    place = ((above * across + left) * tile[0] + row % tile[0]) * tile[1] + column % tile[1]
    return place.flatten().argsort()


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
        attention: "dense" (the default), or "sparse" for ``sparse_training.nn.BlockSparseAttention`` with a summary of
            the blocks that are not chosen.
        block: most tokens of a block of sparse attention, at least 1. A block is a tile of the image: of 64 tokens one
            of 8x8 patches where their numbers of rows and columns are divisible by 8; see ``tile_of``. Default 64.

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
    check_integer("block", block, 1)
    tile = tile_of(shape[1] // patch, shape[2] // patch, block) if attention == "sparse" else None
    size = block if tile is None else tile[0] * tile[1]
    makers: dict[str, Callable[[int, int], nn.Module]] = {
        "dense": Attention,
        "sparse": partial(BlockSparseAttention, block=size, summary=True),
    }
    if attention not in makers:
        raise UserError(f"`attention` must be one of {', '.join(makers)}, got {attention!r}")
    return nn.Sequential(
        Tokens(shape, width, patch, tile),
        *[Block(width, heads, makers[attention]) for _ in range(depth)],
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, classes),
    )


def vit_sparse(*, shape: Shape, classes: int) -> nn.Sequential:
    """Vision transformer with a token for every pixel and sparse attention to tiles of up to 32 pixels.

    A token attends to up to 256 others, and to the means of the tiles that it does not read. Images of fewer than 512
    pixels are served by dense attention.

    Args:
        shape: (C, H, W) of one image.
        classes: number of classes.

    Returns:
        A model that maps images [N, C, H, W] to logits [N, classes].
    """
    return vit(shape=shape, classes=classes, heads=3, patch=1, attention="sparse", block=32)
