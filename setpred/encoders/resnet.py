"""ResNet trunks with the published iDSPN head."""

from __future__ import annotations

import torchvision.models as zoo
from torch import Tensor, nn

TRUNKS = {18: zoo.resnet18, 34: zoo.resnet34, 50: zoo.resnet50}
STRIDE = 32  # of the trunk; the head halves once more


class ResNet(nn.Module):
    """Image to latent vector: ResNet trunk, BatchNorm, strided convolution, flatten.

    The trunk, from scratch and without its pooling and classifier, reduces by 32; the head's 2x2 convolution of
    stride 2 leaves S x S positions, S = image_size / 64, of latent_dim / S² channels (Zhang et al., ICLR 2022, code).
    Positions are kept apart in the vector, so it knows where things are.

    Args:
        depth: 18, 34 or 50.
        image_size: side of the square image, a multiple of 64.
        latent_dim: length of the vector, a multiple of S².
    """

    def __init__(self, *, depth: int = 18, image_size: int = 128, latent_dim: int = 512) -> None:
        super().__init__()
        side = image_size // (2 * STRIDE)
        if depth not in TRUNKS:
            raise ValueError(f"expected ResNet depth {', '.join(map(str, TRUNKS))}, got {depth}")
        if image_size % (2 * STRIDE) or side == 0 or latent_dim % side**2:
            raise ValueError(
                f"expected image_size a multiple of {2 * STRIDE} and latent_dim a multiple of (image_size / "
                f"{2 * STRIDE})², got {image_size} and {latent_dim}"
            )
        self.image_size, self.latent_dim = image_size, latent_dim
        trunk = TRUNKS[depth](weights=None)
        width = trunk.fc.in_features
        self.trunk = nn.Sequential(*list(trunk.children())[:-2])
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, latent_dim // side**2, 2, stride=2), nn.Flatten()
        )

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, latent_dim]`."""
        return self.head(self.trunk(image))
