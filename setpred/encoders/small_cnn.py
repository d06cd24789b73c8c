"""A small convolutional encoder for CPUs."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Image to latent vector: strided convolutions with BatchNorm and ReLU down to 4 x 4, then a linear layer.

    Each stage halves the side; the first by a 5x5 convolution, the others by 3x3. The 4 x 4 map is flattened, so the
    vector knows where things are.

    Args:
        image_size: side of the square image, 4 · 2^k.
        latent_dim: length of the vector.
        width: channels after the first stage; each further stage doubles them up to `8 * width`.
    """

    def __init__(self, *, image_size: int = 64, latent_dim: int = 256, width: int = 32) -> None:
        super().__init__()
        stages = (image_size // 4).bit_length() - 1
        if stages < 1 or 4 * 2**stages != image_size:
            raise ValueError(f"expected image_size 8, 16, 32, 64, … got {image_size}")
        self.image_size, self.latent_dim = image_size, latent_dim
        channels = [3] + [width * 2 ** min(stage, 3) for stage in range(stages)]
        layers: list[nn.Module] = []
        for stage, (narrow, wide) in enumerate(itertools.pairwise(channels)):
            kernel = 5 if stage == 0 else 3
            layers += [
                nn.Conv2d(narrow, wide, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
            ]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels[-1], latent_dim))

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, latent_dim]`."""
        return self.network(image)
