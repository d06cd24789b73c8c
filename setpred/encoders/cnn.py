"""Convolutional trunks and encoders of images."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

SIDE = 8  # of the map of a `SmallTrunk`


def stage(narrow: int, wide: int, kernel: int, stride: int) -> nn.Sequential:
    """Build convolution, BatchNorm and ReLU."""
    convolution = nn.Conv2d(narrow, wide, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide), nn.ReLU(inplace=True))


def halvings(widths: Sequence[int]) -> list[nn.Module]:
    """Build stages from an image down to a map, each of half the size; the first convolution is 5x5, the others 3x3."""
    return [stage(narrow, wide, 3 if i else 5, 2) for i, (narrow, wide) in enumerate(pairwise([3, *widths]))]


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
    """Trunk from image to map: strided convolutions, then residual blocks.

    `[batch, 3, image_size, image_size]` -> `[batch, widths[-1], side, side]`, side = image_size / 2^len(widths).

    Args:
        image_size: side of the square image, a multiple of 2^len(widths).
        widths: channels after each halving of the size.
        blocks: number of residual blocks.

    Raises:
        ValueError: a size that cannot be halved, or no widths.
    """

    def __init__(self, *, image_size: int, widths: Sequence[int] = (24, 48), blocks: int = 2) -> None:
        if not widths or image_size % 2 ** len(widths) or blocks < 0:
            raise ValueError(
                f"expected widths, an image_size that is a multiple of 2^len(widths) and blocks >= 0, got "
                f"{list(widths)}, {image_size} and {blocks}"
            )
        super().__init__(*halvings(widths), *(ResidualBlock(widths[-1]) for _ in range(blocks)))
        self.image_size, self.channels = image_size, widths[-1]


class SlotTrunk(nn.Sequential):
    """Trunk of Slot Attention: 5x5 convolutions with ReLU, without normalisation (Locatello et al., NeurIPS 2020).

    `[batch, 3, image_size, image_size]` -> `[batch, width, side, side]`, side = image_size / Π strides. The published
    set prediction has 64 channels on 32 x 32 positions of a 128x128 image.

    Args:
        image_size: side of the square image.
        width: channels of every layer.
        strides: stride of each layer.
    """

    def __init__(self, *, image_size: int, width: int = 64, strides: Sequence[int] = (1, 2, 2, 1)) -> None:
        channels = [3] + [width] * len(strides)
        layers: list[nn.Module] = []
        for (narrow, wide), stride in zip(pairwise(channels), strides, strict=True):
            layers += [nn.Conv2d(narrow, wide, 5, stride=stride, padding=2), nn.ReLU()]
        super().__init__(*layers)
        self.image_size, self.channels = image_size, width


class SmallTrunk(nn.Sequential):
    """Trunk from image to an 8 x 8 map: strided convolutions with BatchNorm, then one of stride 1.

    `[batch, 3, image_size, image_size]` -> `[batch, channels, 8, 8]`.

    Args:
        image_size: side of the square image, 8 · 2^k with k >= 1.
        width: channels after the first stage; each further stage doubles them, up to `4 * width`.

    Raises:
        ValueError: another image_size.
    """

    def __init__(self, *, image_size: int, width: int = 32) -> None:
        stages = (image_size // SIDE).bit_length() - 1
        if stages < 1 or SIDE * 2**stages != image_size:
            raise ValueError(f"expected image_size {2 * SIDE}, {4 * SIDE}, {8 * SIDE}, …, got {image_size}")
        widths = [width * 2 ** min(stage, 2) for stage in range(stages)]
        super().__init__(*halvings(widths), stage(widths[-1], widths[-1], 3, 1))
        self.image_size, self.channels = image_size, widths[-1]


class SmallCNN(nn.Module):
    """Encoder from image to latent vector: convolutions, then the maximum over positions.

        f = trunk(image),   z = W max_p MLP([f_p, position p])

    The same network runs at every position, and the maximum pools the positions, as a set encoder pools elements. It
    learns faster than a linear layer on the flattened map.

    Args:
        trunk: image to map, with `channels` and `image_size`; a `SmallTrunk` of `image_size` and `width` unless given.
        image_size: side of the square image, 8 · 2^k with k >= 1.
        latent_dim: length of the vector.
        width: width of the `SmallTrunk`.
        hidden_dim: width of the MLP at each position.
    """

    def __init__(
        self,
        trunk: nn.Module | None = None,
        *,
        image_size: int,
        latent_dim: int = 256,
        width: int = 32,
        hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.trunk = SmallTrunk(image_size=image_size, width=width) if trunk is None else trunk
        self.image_size, self.latent_dim = self.trunk.image_size, latent_dim
        self.at_position = nn.Sequential(
            stage(self.trunk.channels + 2, hidden_dim, 1, 1), nn.Conv2d(hidden_dim, latent_dim, 1)
        )
        self.head = nn.Linear(latent_dim, latent_dim)

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, latent_dim]`."""
        features = self.trunk(image)
        lines = (torch.linspace(-1, 1, side, device=image.device) for side in features.shape[2:])
        position = torch.stack(torch.meshgrid(*lines, indexing="ij")).to(features.dtype)
        # shape, not len(), which would fix the batch size of an exported program
        outputs = self.at_position(torch.cat([features, position.expand(features.shape[0], -1, -1, -1)], dim=1))
        return self.head(outputs.amax((2, 3)))
