"""From an image, or a set, to a set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner import OfTokens


def unit_images(images: Tensor) -> Tensor:
    """uint8 images to float in [0, 1]; float images pass."""
    # divided in place: of a large batch the memory is most of the time
    return images.float().div_(255) if images.dtype == torch.uint8 else images


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
    """An encoder followed by a set decoder.

    Encoders with an `in_dim`, such as `setpred.aggregators.SetEncoder`, take sets of elements of so many numbers; all
    others take images. Features are a vector z `[batch, latent_dim]`, or tokens `[batch, tokens, token_dim]` where
    both parts have a `token_dim`.

    Args:
        encoder: `[batch, 3, H, W]` in [0, 1] -> features; or a set `[batch, n, in_dim]` and its mask -> features.
        decoder: features -> elements `[batch, set_size, set_dim]`, with `refine` yielding its iterates. One that is
            `conditional` gets the input set too, as `condition`; one that takes tokens of a set gets its mask.

    Raises:
        InputError: features that do not fit; see `check_parts`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        check_parts(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder
        self.takes_sets = getattr(encoder, "in_dim", None) is not None
        if getattr(decoder, "conditional", False) and not self.takes_sets:
            raise InputError(
                f"the decoder's objective is conditioned on an input set, but the encoder {type(encoder).__name__} "
                "takes images; take a set encoder, or an objective without `Conditioned`"
            )

    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features from uint8 or unit float images `[batch, 3, H, W]`, or from sets `[batch, n, in_dim]`."""
        if self.takes_sets:
            return self.encoder(inputs, mask)
        if inputs.ndim != 4 or inputs.shape[1] != 3:
            raise ValueError(f"expected images [batch, 3, height, width], got {list(inputs.shape)}")
        wanted = getattr(self.encoder, "image_size", None)
        if wanted is not None and inputs.shape[2:] != (wanted, wanted):
            raise ValueError(f"expected images of {wanted}x{wanted}, got {inputs.shape[3]}x{inputs.shape[2]}")
        return self.encoder(unit_images(inputs))

    def forward(self, inputs: Tensor, *, mask: Tensor | None = None, iterations: int | None = None) -> Tensor:
        """Predicted elements `[batch, set_size, set_dim]`.

        In evaluation mode a prediction depends on the input and the model alone: what is random is a function of the
        parts' seeds. In training it is drawn afresh.

        Args:
            inputs: images `[batch, 3, H, W]`, uint8 or float in [0, 1]; or sets `[batch, n, in_dim]`.
            mask: which elements of the input sets exist, bool `[batch, n]`; all unless given.
            iterations: overrides the decoder's number of steps.
        """
        return self.decoder(self.encode(inputs, mask), **self._beside(inputs, mask, iterations))

    def refine(self, inputs: Tensor, *, mask: Tensor | None = None, iterations: int | None = None) -> Iterator[Tensor]:
        """Yields every iterate of the prediction, the start first; arguments as in `forward`."""
        return self.decoder.refine(self.encode(inputs, mask), **self._beside(inputs, mask, iterations))

    def _beside(self, inputs: Tensor, mask: Tensor | None, iterations: int | None) -> dict[str, Any]:
        """What the decoder gets beside the features; of input sets only what it asks for."""
        beside: dict[str, Any] = {"iterations": iterations}
        if getattr(self.decoder, "conditional", False):
            beside["condition"] = inputs
        if mask is not None and not mask.all() and any(isinstance(part, OfTokens) for part in self.decoder.modules()):
            raise InputError("OfTokens knows no absent tokens, got input sets with some; give sets of one size")
        takes_tokens = getattr(self.decoder, "token_dim", None) is not None
        if mask is not None and takes_tokens and not getattr(self.decoder, "masks_elements", False):
            beside["mask"] = mask
        return beside


@dataclass(frozen=True)
class Step:
    """Inputs of a training step, or of a batch of a validation; its result also depends on weights and modes.

    Args:
        model, loss: the parts in training.
        batch: see `setpred.training.SetPrediction`.
        seed: seed of torch's generator at the begin of the step; None for a validation, which draws no numbers.
        iterations: steps of the descent; the decoder's own number by default.
    """

    model: SetPredictor
    loss: nn.Module
    batch: dict[str, Tensor]
    seed: int | None = None
    iterations: int | None = None

    @property
    def input_name(self) -> str:
        return "image" if "image" in self.batch else "input"

    def predict(self) -> Tensor:
        """Predicted sets `[batch, set_size, set_dim]`, with torch's generator in its present state."""
        mask = self.batch.get("input_mask")
        return self.model(self.batch[self.input_name], mask=mask, iterations=self.iterations)

    def inputs(self) -> Tensor:
        """Images or sets; padding, which may hold any numbers, is zero."""
        inputs, mask = self.batch[self.input_name], self.batch.get("input_mask")
        return inputs if mask is None else inputs.masked_fill(~mask.unsqueeze(-1), 0)
