"""The loss of nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from setpred.losses.base import SetLoss, counts
from setpred.matching import pairwise_smooth_l1


class ChamferLoss(SetLoss):
    """½ [(1/m) Σ_j min_i cost_ij + (1/n) Σ_i min_j cost_ij] with the smooth L1 cost: no matching, O(nm).

    Zero also for sets that repeat elements differently, so it cannot tell multisets of equal support apart. An empty
    set has no nearest element: a pair with one costs 0.
    """

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        cost = pairwise_smooth_l1(predicted, target, self.element_weights(predicted))
        return 0.5 * (_nearest(cost, predicted_mask, target_mask) + _nearest(cost.mT, target_mask, predicted_mask))


def _nearest(cost: Tensor, of: Tensor | None, to: Tensor | None) -> Tensor:
    """Mean over the present columns ("to") of the least cost among the present rows ("of")."""
    counted = cost.new_ones(cost.shape[::2]).bool() if to is None else to
    if of is not None:
        cost = cost.masked_fill(~of.unsqueeze(-1), torch.inf)
        counted = counted & of.any(1, keepdim=True)
    return cost.amin(1).masked_fill(~counted, 0.0).sum(-1) / counts(cost.mT, counted).clamp(min=1)
