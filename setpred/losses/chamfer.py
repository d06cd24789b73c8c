"""Chamfer loss, of nearest neighbours."""

import torch
from torch import Tensor

from setpred.losses.base import Mask, SetLoss
from setpred.matching import pairwise_smooth_l1
from setpred.sets import mean_present


class ChamferLoss(SetLoss):
    """½ [(1/m) Σ_j min_i cost_ij + (1/n) Σ_i min_j cost_ij] with the smooth L1 cost: no matching, O(nm).

    Also zero for sets that repeat elements differently: it cannot distinguish multisets of equal support. A pair with
    an empty set costs 0.
    """

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        cost = pairwise_smooth_l1(predicted, target, self.element_weights(predicted))
        return 0.5 * (_nearest(cost, predicted_mask, target_mask) + _nearest(cost.mT, target_mask, predicted_mask))


def _nearest(cost: Tensor, rows: Mask, columns: Mask) -> Tensor:
    """Mean over the present columns of the least cost among the present rows."""
    if rows is not None:
        cost = cost.masked_fill(~rows.unsqueeze(-1), torch.inf)
        filled = rows.any(1, keepdim=True).expand(-1, cost.shape[2])
        columns = filled if columns is None else columns & filled
    return mean_present(cost.amin(1), columns)
