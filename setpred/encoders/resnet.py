"""ResNet trunks, and the published iDSPN encoder."""

import torchvision.models as zoo
from torch import Tensor, nn

TRUNKS = {18: zoo.resnet18, 34: zoo.resnet34, 50: zoo.resnet50}
STRIDE = 64  # of trunk and head together


class ResNetTrunk(nn.Sequential):
    """Trunk from image to map: a ResNet from scratch, without its pooling and classifier.

    `[batch, 3, image_size, image_size]` -> `[batch, channels, side, side]`, side = image_size / 2^(stages + 1). All
    four stages give 512 channels, 2048 at depth 50; each stage less gives twice the side and half the channels.

    Args:
        depth: 18, 34 or 50.
        image_size: side of the square image, a multiple of 2^(stages + 1).
        stages: 1 to 4, the first ones of the network. Two give 16 x 16 positions of a 128x128 image, for decoders
            that read tokens.

    Raises:
        ValueError: another depth, size or number of stages.
    """

    def __init__(self, *, depth: int = 18, image_size: int, stages: int = 4) -> None:
        if depth not in TRUNKS or stages not in range(1, 5):
            raise ValueError(
                f"expected ResNet depth {', '.join(map(str, TRUNKS))} and 1 to 4 stages, got {depth} and {stages}"
            )
        stride = 2 ** (stages + 1)
        if image_size % stride or image_size < stride:
            raise ValueError(f"expected image_size a multiple of {stride}, got {image_size}")
        resnet = TRUNKS[depth](weights=None)
        super().__init__(*list(resnet.children())[: 4 + stages])  # the stem has four
        self.image_size, self.channels = image_size, resnet.fc.in_features >> (4 - stages)


class ResNet(nn.Module):
    """Encoder from image to latent vector: ResNet trunk, BatchNorm, strided convolution, flatten.

    The trunk reduces by 32; the head's 2x2 convolution of stride 2 leaves S x S positions, S = image_size / 64, of
    latent_dim / S² channels (Zhang et al., ICLR 2022, code). Each position has its own part of the vector, so the
    vector encodes locations.

    Args:
        depth: 18, 34 or 50.
        image_size: side of the square image, a multiple of 64.
        latent_dim: length of the vector, a multiple of S².

    Raises:
        ValueError: another size.
    """

    def __init__(self, *, depth: int = 18, image_size: int, latent_dim: int = 512) -> None:
        super().__init__()
        side = image_size // STRIDE
        if image_size % STRIDE or side == 0 or latent_dim % side**2:
            raise ValueError(
                f"expected image_size a multiple of {STRIDE} and latent_dim a multiple of (image_size / {STRIDE})², "
                f"got {image_size} and {latent_dim}"
            )
        self.trunk = ResNetTrunk(depth=depth, image_size=image_size)
        self.image_size, self.latent_dim, width = image_size, latent_dim, self.trunk.channels
        convolution = nn.Conv2d(width, latent_dim // side**2, 2, stride=2)
        self.head = nn.Sequential(nn.BatchNorm2d(width), convolution, nn.Flatten())

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, latent_dim]`."""
        return self.head(self.trunk(image))
