"""Squared error, for aligned elements."""

import torch
from torch import Tensor, nn

from setpred.losses.cross_entropy import check_aligned


class SquaredError(nn.Module):
    """(1/(n D)) Σ_i |predicted_i - target_i|², for n elements of D numbers, in squared units of the target.

    Elements are aligned: prediction i belongs to target i, without a matching, as where element i is the same thing in
    the input and in the target. The precision is at least float32, also under autocast.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Loss of each example, `[batch]`, of sets `[batch, n, D]`."""
        check_aligned(predicted, target)
        with torch.autocast(predicted.device.type, enabled=False):
            if predicted.dtype in (torch.float16, torch.bfloat16):
                predicted = predicted.float()
            return (predicted - target.to(predicted.dtype)).square().mean((1, 2))
