"""The loss of classes, where each element has its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.matching import check_pair


class CrossEntropy(nn.Module):
    """(1/m) Σ_i -Σ_k target_ik log softmax_k(predicted_i): logits against classes, in nats.

    Elements are aligned: predicted i is compared with target i, so no matching is made and the order is seen, unlike
    in every `SetLoss`. The class of a whole set is the one element of `[batch, 1, classes]`.

    Targets are one-hot, or distributions. A row of zeros has no class: it costs nothing, and m counts the others. An
    example without any costs 0. Computed in float32 at least, also under autocast.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Loss of each example, `[batch]`, of logits and classes `[batch, n, classes]`."""
        check_pair(predicted, target)
        if predicted.shape != target.shape:
            raise ValueError(
                f"expected as many logits as classes, got {list(predicted.shape)} and {list(target.shape)}"
            )
        with torch.autocast(predicted.device.type, enabled=False):
            if predicted.dtype in (torch.float16, torch.bfloat16):
                predicted = predicted.float()
            each = functional.cross_entropy(predicted.mT, target.mT.to(predicted.dtype), reduction="none")
        classed = target.sum(-1) > 0
        return each.sum(-1) / classed.sum(-1).clamp(min=1)
