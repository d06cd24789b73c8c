"""Set losses, per example: `[batch, n, dim]` predicted and target sets to `[batch]`."""

from __future__ import annotations

from torch import Tensor, nn

from setpred.matching import hungarian, pairwise_smooth_l1


class HungarianLoss(nn.Module):
    """min_π (1/m) Σ_j mean_d smooth_L1(predicted_π(j) - target_j), the minimum over one-to-one matchings.

    Padding takes part: a target of zeros asks a prediction to be zero, presence included. This is the loss of
    the published iDSPN (Zhang et al., ICLR 2022). The gradient is that of the matched cost, the matching held
    fixed. Raises `setpred.matching.NotFiniteError`.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        if predicted.shape[1] != target.shape[1]:
            raise ValueError(
                f"expected sets of one size, padded, got {predicted.shape[1]} predicted and {target.shape[1]} target "
                "elements; predictions left over would cost nothing"
            )
        cost = pairwise_smooth_l1(predicted, target)
        return cost.gather(1, hungarian(cost).unsqueeze(1)).squeeze(1).mean(-1)


class ChamferLoss(nn.Module):
    """½ [(1/m) Σ_j min_i cost_ij + (1/n) Σ_i min_j cost_ij] with the smooth L1 cost: no matching, O(nm).

    Zero also for sets that repeat elements differently, so it cannot tell multisets of equal support apart.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        cost = pairwise_smooth_l1(predicted, target)
        return 0.5 * (cost.amin(1).mean(-1) + cost.amin(2).mean(-1))
