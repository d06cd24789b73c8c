"""From an image to a set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.errors import InputError


def unit_images(images: Tensor) -> Tensor:
    """uint8 images to float in [0, 1]; float images pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_parts(encoder: nn.Module, decoder: nn.Module) -> None:
    """Raises `InputError` where the encoder gives other features than the decoder takes.

    A part that gives or takes tokens has their length as `token_dim`; of vectors `latent_dim` is compared where both
    parts state it.
    """
    given, taken = (getattr(part, "token_dim", None) for part in (encoder, decoder))
    sizes = [getattr(part, "latent_dim", None) for part in (encoder, decoder)]
    if given == taken and (given is not None or None in sizes or sizes[0] == sizes[1]):
        return
    gives, takes = (
        f"tokens of {dim} numbers" if dim is not None else "a vector" + (f" of {size} numbers" if size else "")
        for dim, size in zip((given, taken), sizes, strict=True)
    )
    names = [type(part).__name__ for part in (encoder, decoder)]
    if (given is None) == (taken is None):
        advice = f"give both the same {'latent_dim' if given is None else 'token_dim'}"
    elif given is None:
        advice = "take an encoder that gives tokens, such as setpred.encoders.PositionedTokens"
    else:
        advice = "take an encoder that gives a vector, such as setpred.encoders.SmallCNN"
    raise InputError(f"the encoder {names[0]} gives {gives}, the decoder {names[1]} takes {takes}; {advice}")


class SetPredictor(nn.Module):
    """An image encoder followed by a set decoder.

    Features are a vector z `[batch, latent_dim]`, or tokens `[batch, tokens, token_dim]` where both parts have a
    `token_dim`.

    Args:
        encoder: `[batch, 3, H, W]` in [0, 1] -> features.
        decoder: features -> elements `[batch, set_size, set_dim]`, with `refine` yielding its iterates.

    Raises:
        InputError: features that do not fit; see `check_parts`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        check_parts(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """Features from uint8 or unit float images `[batch, 3, H, W]`."""
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
            iterations: overrides the decoder's number of steps.
        """
        return self.decoder(self.encode(images), index=self._index(images, index), iterations=iterations)

    def refine(self, images: Tensor, *, index: Tensor | None = None, iterations: int | None = None) -> Iterator[Tensor]:
        """Yields every iterate of the prediction, the start first; arguments as in `forward`."""
        return self.decoder.refine(self.encode(images), index=self._index(images, index), iterations=iterations)

    def _index(self, images: Tensor, index: Tensor | None) -> Tensor | None:
        if index is None and not self.training:
            return torch.arange(images.shape[0])
        return index
