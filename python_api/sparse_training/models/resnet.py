"""A residual network for small images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.models.shapes import Shape


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make the shortcut of a residual block: a 1x1 convolution with BatchNorm where the shape changes.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: stride of the block.
    """
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut around them.

    The shortcut is a 1x1 convolution where the shape changes. The last BatchNorm's scale starts at 0, so that each
    block starts as its shortcut (Goyal et al., 2017).

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def classifier(layers: list[nn.Module], channels: int, classes: int) -> nn.Sequential:
    """Make a network of convolutional layers, a global average and a linear head, with He's initial weights.

    Args:
        layers: the layers.
        channels: channels of their output.
        classes: number of classes.
    """
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet(*, shape: Shape, classes: int) -> nn.Sequential:
    """20-layer ResNet for small images (He et al., 2016, section 4.2), with projections.

    Three stages of three blocks, of 16, 32 and 64 channels, then a global average, so that images may have any size.
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
    return classifier(layers, inputs, classes)
