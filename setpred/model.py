"""From an image to a set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def unit_images(images: Tensor) -> Tensor:
    """uint8 images to float in [0, 1]; float images pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class SetPredictor(nn.Module):
    """An image encoder followed by a set decoder.

    Args:
        encoder: `[batch, 3, H, W]` in [0, 1] -> z `[batch, latent_dim]`.
        decoder: z -> elements `[batch, set_size, set_dim]`, with `refine` yielding its iterates.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """z `[batch, latent_dim]` from uint8 or unit float images `[batch, 3, H, W]`."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images [batch, 3, height, width], got {list(images.shape)}")
        wanted = getattr(self.encoder, "image_size", None)
        if wanted is not None and images.shape[2:] != (wanted, wanted):
            raise ValueError(f"expected images of {wanted}x{wanted}, got {images.shape[3]}x{images.shape[2]}")
        return self.encoder(unit_images(images))

    def forward(self, images: Tensor, *, index: Tensor | None = None, iterations: int | None = None) -> Tensor:
        """Predicted elements `[batch, set_size, set_dim]`.

        Args:
            images: `[batch, 3, H, W]`, uint8 or float in [0, 1].
            index: `[batch]` int, which examples these are; the start of the descent then depends on them
                alone. Without it the start is random in training, and in evaluation that of examples 0, 1, ….
            iterations: overrides the decoder's number of descent steps.
        """
        return self.decoder(self.encode(images), index=self._index(images, index), iterations=iterations)

    def refine(self, images: Tensor, *, index: Tensor | None = None, iterations: int | None = None) -> Iterator[Tensor]:
        """Yields every iterate of the prediction, the start first; arguments as in `forward`."""
        return self.decoder.refine(self.encode(images), index=self._index(images, index), iterations=iterations)

    def _index(self, images: Tensor, index: Tensor | None) -> Tensor | None:
        if index is None and not self.training:
            return torch.arange(images.shape[0])
        return index
