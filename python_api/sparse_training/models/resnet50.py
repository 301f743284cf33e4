"""ResNet-50, for images of ImageNet's size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training.models.resnet import classifier, projection
from sparse_training.models.shapes import Shape

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # inner channels and blocks of each stage
EXPANSION = 4


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with BatchNorm and a shortcut around them.

    The stride is that of the 3x3 convolution. The last BatchNorm's scale starts at 0, so that each block starts as its
    shortcut (Goyal et al., 2017).

    Args:
        inputs: channels of the input.
        inner: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the 3x3 convolution.
    """

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * inner
        self.conv1, self.norm1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnet50(*, shape: Shape, classes: int) -> nn.Sequential:
    """50-layer ResNet (He et al., 2016), with the stride in the 3x3 convolutions; images may have any size.

    25,557,032 parameters for 3 channels and 1,000 classes.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = 64
    for stage, (inner, blocks) in enumerate(STAGES):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, inner, stride=2 if stage and not block else 1))
            inputs = EXPANSION * inner
    return classifier(layers, inputs, classes)
