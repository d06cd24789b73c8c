"""The convolutions that Slot Attention was published with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class SlotTrunk(nn.Sequential):
    """Image to a map: 5x5 convolutions of one width with ReLU, without normalisation (Locatello et al., NeurIPS 2020).

    `[batch, 3, image_size, image_size]` -> `[batch, width, side, side]`, side = image_size / Π strides: the published
    set prediction has 64 channels on 32 x 32 positions of a 128x128 image, that is 1024 tokens.

    Args:
        image_size: side of the square image.
        width: channels of every layer.
        strides: of the layers.
    """

    def __init__(self, *, image_size: int = 128, width: int = 64, strides: Sequence[int] = (1, 2, 2, 1)) -> None:
        channels = [3] + [width] * len(strides)
        layers: list[nn.Module] = []
        for (narrow, wide), stride in zip(pairwise(channels), strides, strict=True):
            layers += [nn.Conv2d(narrow, wide, 5, stride=stride, padding=2), nn.ReLU()]
        super().__init__(*layers)
        self.image_size, self.channels = image_size, width
