"""Encoder that a first decoder trains along."""

from typing import Any

from torch import Tensor, nn

from setpred.errors import InputError
from setpred.nn import check_parts, copy_attributes


class Supervised(nn.Module):
    """Encoder of images that a first decoder trains along with the model's decoder: deep supervision.

        loss of the model + L(decoder(x), Y),    x = encoder(image)

    The model's decoder reads x. So a decoder that learns slowly, such as `setpred.decoders.FlowMatching` on images,
    reads features that already hold the objects, such as the votes of `setpred.inner.VotingEnergy`. The first decoder
    has no part in a prediction.

    Args:
        encoder: image to features x.
        decoder: x to sets, in training alone; one that needs no target and no input set.
        loss: L, of sets; such as `setpred.losses.HungarianLoss`, which matches them.

    Source: Lee, Xie, Gallagher, Zhang, Tu, "Deeply-Supervised Nets", AISTATS 2015.

    Raises:
        InputError: a decoder of other features, or that samples; a loss that does not match.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        check_parts(encoder, decoder)
        needy = [name for name in ("denoises", "conditional", "draws_layers") if getattr(decoder, name, False)]
        if needy or getattr(loss, "aligned", False):
            raise InputError(
                "Supervised: expected a decoder that needs the features alone, and a loss that matches sets, got "
                f"{type(decoder).__name__} and {type(loss).__name__} with aligned {getattr(loss, 'aligned', False)}; "
                "take another decoder, or set aligned to false"
            )
        self.encoder, self.decoder, self.loss = encoder, decoder, loss
        copy_attributes(encoder, self, ("image_size", "token_dim", "latent_dim"))
        self.features: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, without the features of a step."""
        return self.__dict__ | {"features": None}

    def forward(self, image: Tensor) -> Tensor:
        """Images `[batch, 3, H, W]` to the features of the encoder; in training they are kept for `penalty`."""
        features = self.encoder(image)
        self.features = features if self.training else None
        return features

    def penalty(self, step: Any, predicted: Tensor) -> Tensor:
        """L of each example of a `setpred.model.Step`, `[batch]`, on the features of its latest prediction.

        Raises:
            ValueError: no prediction before it.
        """
        if self.features is None:
            raise ValueError("Supervised: expected a prediction in training before its loss, got none; predict first")
        features, self.features = self.features, None
        return self.loss(self.decoder(features).float(), step.batch["elements"])
