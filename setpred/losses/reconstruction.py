"""Reconstruction loss of image layers, for object discovery without labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.nn import composite, unit_images


class Reconstruction(nn.Module):
    """Mean squared error between the image that layers draw and the true one.

        loss = mean_{pixel, channel} (Σ_i softmax_i(α_i) · colour_i - image)²

    The layers are a set: their order does not matter. The images are in [0, 1]; Slot Attention's (Locatello et al.,
    NeurIPS 2020) are in [-1, 1], so its values are 4 times as large.
    """

    truth = "image"  # the entry of a batch that predictions are compared with

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Loss of each example, `[batch]`.

        Args:
            predicted: layers `[batch, n, 4 · S²]`, as of `setpred.decoders.SpatialBroadcast`.
            target: images `[batch, 3, T, T]`, uint8 or float in [0, 1], with T a multiple of S; larger ones are
                compared at the size of the layers, as means over squares of pixels.

        Raises:
            ValueError: images of another size.
        """
        with torch.autocast(predicted.device.type, enabled=False):
            drawn, wanted = composite(predicted).image, unit_images(target).to(predicted.dtype)
            (height, width), side = wanted.shape[2:], drawn.shape[-1]
            if height != width or height % side:
                raise ValueError(f"expected square images of a multiple of {side} pixels, got {width}x{height}")
            if height > side:
                wanted = functional.avg_pool2d(wanted, height // side)
            return (drawn - wanted).square().mean((1, 2, 3))
