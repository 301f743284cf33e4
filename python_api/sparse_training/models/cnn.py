"""Convolutional networks of 6,000 to 2 million parameters."""

from __future__ import annotations

from torch import nn

from sparse_training.errors import UserError
from sparse_training.models.shapes import Shape, pooled_shape


def cnn_620k(*, shape: Shape, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 128 channels, each followed by a pool.

    620,362 parameters for 3x32x32 images and 10 classes.
    """
    channels, height, width = pooled_shape("cnn-620k", shape, pools=3)
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
    channels, height, width = pooled_shape("cnn-2m", shape, pools=2)
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

    Blocks, and pools before BatchNorm, make a step cheap: a quarter of the multiplications of ``cnn-620k`` on 28x28
    images. Sides must be even and at least 8. 116,554 parameters for 3x32x32 images and 10 classes.
    """
    if shape[1] % 2 or shape[2] % 2:
        raise UserError(
            f"the model cnn-bn cuts images into blocks of 2x2 pixels; their sides must be even, got {shape[1:]}"
        )
    _, height, width = pooled_shape("cnn-bn", shape, pools=3)
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

    Meant as a proxy: about a hundredth of the other models' work. 6,418 parameters for 3x32x32 images and 10 classes.
    """
    layers: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (8, 16, 32):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


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
