"""The loss of the best one-to-one matching."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from setpred.losses.base import SetLoss, counts
from setpred.matching import hungarian, pairwise_smooth_l1, smooth_l1


class HungarianLoss(SetLoss):
    """min_π (1/m) Σ_j mean_d w_d smooth_L1(predicted_π(j) - target_j), the minimum over one-to-one matchings.

    Padding takes part: a target of zeros asks a prediction to be zero, presence included. This is the loss of
    the published iDSPN (Zhang et al., ICLR 2022); Slot Attention's (Locatello et al., NeurIPS 2020) is the same with
    m times the value, and its published rows differ in the weight of the coordinates. The gradient is that of the
    matched cost, the matching held fixed.

    With masks, the smaller of the two sets is filled up with zeros to the size of the larger, and no further: an
    element too many costs what it differs from nothing, and the mean is over the larger set. Sets that are both
    empty cost 0.

    Raises `setpred.matching.NotFiniteError`; `ValueError` for sets of different sizes without masks.
    """

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        if predicted_mask is None and target_mask is None:
            if predicted.shape[1] != target.shape[1]:
                raise ValueError(
                    f"expected sets of one size, padded, got {predicted.shape[1]} predicted and {target.shape[1]} "
                    "target elements; predictions left over would cost nothing"
                )
            return self._matched_cost(predicted, target).mean(-1)
        size = max(predicted.shape[1], target.shape[1])
        largest = counts(predicted, predicted_mask).maximum(counts(target, target_mask))
        predicted, predicted_mask = _filled(predicted, predicted_mask, size, largest)
        target, target_mask = _filled(target, target_mask, size, largest)
        matched = self._matched_cost(predicted, target, predicted_mask, target_mask)
        return matched.masked_fill(~target_mask, 0.0).sum(-1) / largest.clamp(min=1)

    def _matched_cost(self, predicted: Tensor, target: Tensor, *masks: Tensor) -> Tensor:
        """The cost of each target element and its prediction, `[batch, m]`; of any one where masks leave it none."""
        weights = self.element_weights(predicted)
        # the pairs that are not matched have no gradient: they need not be kept for one
        assignment = hungarian(pairwise_smooth_l1(predicted.detach(), target.detach(), weights), *masks)
        partner = assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, predicted.shape[-1])
        return smooth_l1(predicted.gather(1, partner), target, weights)


def _filled(elements: Tensor, mask: Tensor | None, size: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros up to `size`, and a mask of `largest [batch]` of them: those that are present, then zeros."""
    if mask is None:
        mask = elements.new_ones(elements.shape[:2]).bool()
    missing = size - elements.shape[1]
    elements, mask = functional.pad(elements, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
    lacking = (largest - mask.sum(1)).unsqueeze(1)
    return elements, mask | ((~mask).cumsum(1) <= lacking)
