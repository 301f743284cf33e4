"""Image classifiers for the trainer: plain CNNs, a small ResNet, a small vision transformer, or one of your own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.errors import UserError

Shape = tuple[int, int, int]


def build_model(name: str, *, shape: Shape, classes: int) -> nn.Module:
    """Makes a model with fresh weights, drawn from torch's global generator.

    Args:
        name: one of `MODELS`, or the import path `module:factory` of a callable that takes
            `shape` and `classes` as keywords and returns an `nn.Module`.
        shape: (C, H, W) of one image.
        classes: number of classes, at least 2.

    Returns:
        A module that maps float images [N, C, H, W] to logits [N, classes].

    Raises:
        UserError: no such model or factory, one that does not fit, or a shape too small for it.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"shape must be (channels, height, width), each at least 1, got {shape}")
    if classes < 2:
        raise UserError(f"classes must be at least 2, got {classes}")
    if name in _FACTORIES:
        return _FACTORIES[name](shape=shape, classes=classes)
    if ":" not in name:
        raise UserError(f"unknown model {name!r}: one of {', '.join(MODELS)} or module:factory is wanted")
    model = _import_factory(name)(shape=shape, classes=classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _import_factory(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"model {name!r} is not an import path: module:factory is wanted")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = " ".join(str(error).split())  # some packages explain theirs at length
        raise UserError(f"model {name!r}: cannot import {module_name}: {reason}") from error
    try:
        factory: object = getattr(module, attribute)
    except AttributeError:
        raise UserError(f"model {name!r}: module {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise UserError(f"model {name!r}: {attribute} must be callable, got {type(factory).__name__}")
    try:
        # Asked beforehand, so that a TypeError from inside the factory keeps its traceback.
        inspect.signature(factory).bind(shape=(1, 1, 1), classes=2)
    except TypeError as error:
        raise UserError(f"model {name!r}: must be callable as {attribute}(shape=..., classes=...): {error}") from None
    except ValueError:
        pass  # some builtins tell no signature
    return factory


def cnn_620k(*, shape: Shape, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 128 channels, each followed by a pool.

    620,362 parameters for 3x32x32 images and 10 classes.
    """
    channels, height, width = _pooled("cnn-620k", shape, pools=3)
    return nn.Sequential(
        *_conv_relu(channels, 32),
        nn.MaxPool2d(2),
        *_conv_relu(32, 64),
        nn.MaxPool2d(2),
        *_conv_relu(64, 128),
        nn.MaxPool2d(2),
        *_head(128 * height * width, classes),
    )


def cnn_2m(*, shape: Shape, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 128 channels, the last two followed by a pool.

    2,193,226 parameters for 3x32x32 images and 10 classes.
    """
    channels, height, width = _pooled("cnn-2m", shape, pools=2)
    return nn.Sequential(
        *_conv_relu(channels, 32),
        *_conv_relu(32, 64),
        nn.MaxPool2d(2),
        *_conv_relu(64, 128),
        nn.MaxPool2d(2),
        *_head(128 * height * width, classes),
    )


def cnn_bn(*, shape: Shape, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 128 channels over 2x2 blocks of pixels, each with BatchNorm and ReLU.

    Blocks and pools before BatchNorm make a step cheap: a quarter of the multiplications of ``cnn-620k``
    on 28x28 images. For even sides of at least 8. 116,554 parameters for 3x32x32 images and 10 classes.
    """
    if shape[1] % 2 or shape[2] % 2:
        raise UserError(f"model cnn-bn cuts images into 2x2 pixels: wanted even sides, got {shape[1:]}")
    _, height, width = _pooled("cnn-bn", shape, pools=3)
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    inputs = 4 * shape[0]
    for outputs, pool in ((32, True), (64, True), (128, False)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [nn.MaxPool2d(2)] * pool
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, classes))


def cnn_tiny(*, shape: Shape, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 8, 16 and 32 channels, each with stride 2, BatchNorm and ReLU, then an average.

    A proxy: some hundredth of the others' work. 6,418 parameters for 3x32x32 images and 10 classes.
    """
    layers: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (8, 16, 32):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _pooled(name: str, shape: Shape, pools: int) -> Shape:
    """The shape after that many 2x2 pools, channels unchanged."""
    channels, height, width = shape
    smallest = 2**pools
    if min(height, width) < smallest:
        raise UserError(
            f"model {name} halves images {pools} times: at least {smallest}x{smallest} pixels "
            f"wanted, got {height}x{width}"
        )
    return channels, height // smallest, width // smallest


def _conv_relu(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()


def _head(features: int, classes: int) -> tuple[nn.Module, ...]:
    return (
        nn.Flatten(),
        nn.Linear(features, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut around them.

    The shortcut is a 1x1 convolution where the shape changes. The last BatchNorm's scale starts
    at 0, so that each block starts as its shortcut (Goyal et al., 2017).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(*, shape: Shape, classes: int) -> nn.Sequential:
    """The 20-layer ResNet for small images (He et al., 2016, section 4.2), with projections.

    Three stages of three blocks, of 16, 32 and 64 channels; an average over what is left of the
    image makes it fit any size.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    inputs = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [
            ResidualBlock(inputs, outputs, stride),
            ResidualBlock(outputs, outputs, 1),
            ResidualBlock(outputs, outputs, 1),
        ]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


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


_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "cnn-620k": cnn_620k,
    "cnn-2m": cnn_2m,
    "cnn-bn": cnn_bn,
    "cnn-tiny": cnn_tiny,
    "resnet": resnet,
    "vit": vit,
}

MODELS = tuple(_FACTORIES)
