"""A small convolutional encoder for CPUs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

SIDE = 8  # of the map whose positions are pooled, or are tokens


def stage(narrow: int, wide: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(narrow, wide, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(inplace=True),
    )


class SmallTrunk(nn.Sequential):
    """Image to a map of 8 x 8: strided convolutions with BatchNorm, then one that keeps the size.

    `[batch, 3, image_size, image_size]` -> `[batch, channels, 8, 8]`.

    Args:
        image_size: side of the square image, 8 · 2^k with k >= 1.
        width: channels after the first stage; each further stage doubles them up to `4 * width`.
    """

    def __init__(self, *, image_size: int = 64, width: int = 32) -> None:
        stages = (image_size // SIDE).bit_length() - 1
        if stages < 1 or SIDE * 2**stages != image_size:
            raise ValueError(f"expected image_size {2 * SIDE}, {4 * SIDE}, {8 * SIDE}, …, got {image_size}")
        channels = [3] + [width * 2 ** min(stage, 2) for stage in range(stages)]
        halving = [stage(narrow, wide, 3 if i else 5, 2) for i, (narrow, wide) in enumerate(pairwise(channels))]
        super().__init__(*halving, stage(channels[-1], channels[-1], 3, 1))
        self.image_size, self.channels = image_size, channels[-1]


class SmallCNN(nn.Module):
    """Image to latent vector: strided convolutions, then the largest answer over positions.

        f = trunk(image),   z = W max_p MLP([f_p, position p])

    Every position says by the same network what it sees and where it is, and the maximum keeps what was seen anywhere,
    as a set encoder does with elements. Weights shared over positions learn faster than a linear layer on the
    flattened map.

    Args:
        trunk: image to map, with `channels` and `image_size`; a `SmallTrunk` of `image_size` and `width` unless given.
        image_size: side of the square image, 8 · 2^k with k >= 1.
        latent_dim: length of the vector.
        width: of the `SmallTrunk`.
        hidden_dim: width of the MLP at each position.
    """

    def __init__(
        self,
        trunk: nn.Module | None = None,
        *,
        image_size: int = 64,
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
        # its shape, not its len(), which would fix the batch of an exported program
        answers = self.at_position(torch.cat([features, position.expand(features.shape[0], -1, -1, -1)], dim=1))
        return self.head(answers.amax((2, 3)))
