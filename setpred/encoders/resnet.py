"""ResNet trunks, pretrained or not, and the published iDSPN encoder."""

import os
from urllib.error import URLError

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from setpred.errors import InputError, reason

TRUNKS = {18: zoo.resnet18, 34: zoo.resnet34, 50: zoo.resnet50}
CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of torchvision's ResNets
STRIDE = 64  # of trunk and head together


class ResNetTrunk(nn.Sequential):
    """Trunk from image to map: a ResNet without its pooling and classifier, from scratch or pretrained.

    `[batch, 3, image_size, image_size]` -> `[batch, channels, side, side]`, side = image_size / 2^(stages + 1). All
    four stages give 512 channels, 2048 at depth 50; each stage less gives twice the side and half the channels.

    `weights` only says which pretrained weights the trunk is for: its images are normalised as they need it.
    `load_pretrained` downloads and loads them. `setpred train` does so when a new run starts; a checkpoint has its own
    weights, and loads without a download.

    Args:
        depth: 18, 34 or 50.
        image_size: side of the square image, a multiple of 2^(stages + 1).
        stages: 1 to 4, the first ones of the network. Two give 16 x 16 positions of a 128x128 image, for decoders
            that read tokens.
        weights: name of torchvision's weights for this depth, such as IMAGENET1K_V1; None for a random start.

    Raises:
        ValueError: another depth, size or number of stages, or unknown weights.
    """

    def __init__(self, *, depth: int = 18, image_size: int, stages: int = 4, weights: str | None = None) -> None:
        if depth not in TRUNKS or stages not in range(1, 5):
            raise ValueError(
                f"expected ResNet depth {', '.join(map(str, TRUNKS))} and 1 to 4 stages, got {depth} and {stages}"
            )
        stride = 2 ** (stages + 1)
        if image_size % stride or image_size < stride:
            raise ValueError(f"expected image_size a multiple of {stride}, got {image_size}")
        known = {each.name: each for each in zoo.get_model_weights(TRUNKS[depth])}
        if weights is not None and weights not in known:
            raise ValueError(f"expected weights {', '.join(known)} for ResNet-{depth}, got {weights!r}")
        resnet = TRUNKS[depth](weights=None)
        super().__init__(*list(resnet.children())[: 4 + stages])  # the stem has four
        self.image_size, self.channels = image_size, resnet.fc.in_features >> (4 - stages)
        self.pretrained = None if weights is None else known[weights]
        if self.pretrained is not None:
            preset = self.pretrained.transforms()
            for name in ("mean", "std"):
                number = torch.tensor(getattr(preset, name)).view(3, 1, 1)
                self.register_buffer(name, number, persistent=False)  # a constant: no weight of a checkpoint

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, channels, side, side]`."""
        return super().forward(image if self.pretrained is None else (image - self.mean) / self.std)

    def load_pretrained(self) -> None:
        """Load the weights, from torch's cache or by a download; nothing without `weights`.

        Raises:
            InputError: they cannot be downloaded, or are damaged.
        """
        if self.pretrained is None:
            return
        try:
            state = self.pretrained.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise InputError(
                f"cannot download the pretrained weights {self.pretrained} ({reason(error)}); download "
                f"{self.pretrained.url} into {folder}, or leave weights out"
            ) from error
        for place, name in enumerate(CHILDREN[: len(self)]):
            prefix = f"{name}."
            self[place].load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


class ResNet(nn.Module):
    """Encoder from image to latent vector: ResNet trunk, BatchNorm, strided convolution, flatten.

    The trunk reduces by 32; the head's 2x2 convolution of stride 2 leaves S x S positions, S = image_size / 64, of
    latent_dim / S² channels (Zhang et al., ICLR 2022, code). Each position has its own part of the vector, so the
    vector encodes locations.

    Args:
        depth: 18, 34 or 50.
        image_size: side of the square image, a multiple of 64.
        latent_dim: length of the vector, a multiple of S².
        weights: pretrained weights of the trunk, see `ResNetTrunk`.

    Raises:
        ValueError: another size, or unknown weights.
    """

    def __init__(self, *, depth: int = 18, image_size: int, latent_dim: int = 512, weights: str | None = None) -> None:
        super().__init__()
        side = image_size // STRIDE
        if image_size % STRIDE or side == 0 or latent_dim % side**2:
            raise ValueError(
                f"expected image_size a multiple of {STRIDE} and latent_dim a multiple of (image_size / {STRIDE})², "
                f"got {image_size} and {latent_dim}"
            )
        self.trunk = ResNetTrunk(depth=depth, image_size=image_size, weights=weights)
        self.image_size, self.latent_dim, width = image_size, latent_dim, self.trunk.channels
        convolution = nn.Conv2d(width, latent_dim // side**2, 2, stride=2)
        self.head = nn.Sequential(nn.BatchNorm2d(width), convolution, nn.Flatten())

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, latent_dim]`."""
        return self.head(self.trunk(image))
