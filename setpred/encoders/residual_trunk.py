"""A small residual trunk for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from setpred.encoders.small_cnn import stage


class ResidualBlock(nn.Module):
    """x ← ReLU(x + f(x)), f two 3x3 convolutions with BatchNorm (He et al., CVPR 2016).

    The last normalisation starts at zero, so a block starts as the identity (Goyal et al., 2017).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = stage(channels, channels, 3, 1)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.second[1].weight)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(features + self.second(self.first(features)))


class ResidualTrunk(nn.Sequential):
    """Image to a map: strided convolutions down to the token grid, then residual blocks on it.

    `[batch, 3, image_size, image_size]` -> `[batch, widths[-1], side, side]`, side = image_size / 2^len(widths).

    Args:
        image_size: side of the square image, a multiple of 2^len(widths).
        widths: channels after each halving; the first convolution is 5x5, the others 3x3.
        blocks: number of residual blocks.
    """

    def __init__(self, *, image_size: int = 64, widths: Sequence[int] = (24, 48), blocks: int = 2) -> None:
        if not widths or image_size % 2 ** len(widths) or blocks < 0:
            raise ValueError(
                f"expected widths, an image_size that is a multiple of 2^len(widths) and blocks >= 0, got "
                f"{list(widths)}, {image_size} and {blocks}"
            )
        channels = [3, *widths]
        halving = [stage(narrow, wide, 3 if i else 5, 2) for i, (narrow, wide) in enumerate(pairwise(channels))]
        super().__init__(*halving, *(ResidualBlock(widths[-1]) for _ in range(blocks)))
        self.image_size, self.channels = image_size, widths[-1]
