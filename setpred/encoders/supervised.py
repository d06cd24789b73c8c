"""Encoder that a first decoder trains along."""

import torch
from torch import Tensor, nn

from setpred.nn import copy_attributes


class Supervised(nn.Module):
    """Encoder of images that a first decoder trains along with the model's decoder: deep supervision.

        loss of the model + L(decoder(x), Y),    x = encoder(image)

    The model's decoder reads x. So a decoder that learns slowly, such as `setpred.decoders.FlowMatching` on images,
    reads features that already hold the objects, such as the votes of `setpred.inner.VotingEnergy`. The first decoder
    has no part in a prediction.

    Args:
        encoder: image to features x.
        decoder: x to sets, in training alone.
        loss: L, of sets; such as `setpred.losses.HungarianLoss`.

    Source: Lee, Xie, Gallagher, Zhang, Tu, "Deeply-Supervised Nets", AISTATS 2015.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder, self.loss = encoder, decoder, loss
        copy_attributes(encoder, self, ("image_size", "token_dim", "latent_dim"))
        self.features: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Images `[batch, 3, H, W]` to the features of the encoder; in training they are kept for `penalty`."""
        features = self.encoder(image)
        self.features = features if self.training and torch.is_grad_enabled() else None
        return features

    def penalty(self, step: object, predicted: Tensor) -> Tensor:
        """L of each example of a `setpred.model.Step`, `[batch]`, on the features of its prediction."""
        features, self.features = self.features, None
        return self.loss(self.decoder(features).float(), step.batch["elements"])
