"""Cross entropy of classes, for aligned elements."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.matching import check_pair
from setpred.sets import mean_present


class CrossEntropy(nn.Module):
    """(1/m) Σ_i -Σ_k target_ik log softmax_k(predicted_i): logits against classes, in nats.

    Elements are aligned: prediction i belongs to target i, without a matching, so the order counts (unlike in every
    `SetLoss`). The class of a complete set is the one element of `[batch, 1, classes]`.

    Targets are one-hot or distributions. A row of zeros has no class: it costs nothing and does not count in m. An
    example without classes costs 0. The precision is at least float32, also under autocast.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Loss of each example, `[batch]`, of logits and classes `[batch, n, classes]`."""
        check_aligned(predicted, target)
        with torch.autocast(predicted.device.type, enabled=False):
            if predicted.dtype in (torch.float16, torch.bfloat16):
                predicted = predicted.float()
            each = functional.cross_entropy(predicted.mT, target.mT.to(predicted.dtype), reduction="none")
        return mean_present(each, target.sum(-1) > 0)


def check_aligned(predicted: Tensor, target: Tensor) -> None:
    """Raise `ValueError` unless both are sets `[batch, n, dim]` of one shape."""
    check_pair(predicted, target)
    if predicted.shape != target.shape:
        raise ValueError(f"expected sets of one shape, got {list(predicted.shape)} and {list(target.shape)}")
