"""The loss of the best one-to-one matching."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from setpred.errors import InputError
from setpred.losses.base import SetLoss, counts
from setpred.matching import hungarian, pairwise_smooth_l1, smooth_l1
from setpred.schema import ElementSchema


class HungarianLoss(SetLoss):
    """min_π (1/m) Σ_j mean_d w_d smooth_L1(predicted_π(j) - target_j; β_d), the minimum over one-to-one matchings.

    Padding takes part: a target of zeros asks a prediction to be zero, presence included. This is the loss of
    the published iDSPN (Zhang et al., ICLR 2022); Slot Attention's (Locatello et al., NeurIPS 2020) is the same with
    m times the value, and its published rows differ in the weight of the coordinates. The gradient is that of the
    matched cost, the matching held fixed.

    With masks, the smaller of the two sets is filled up with zeros to the size of the larger, and no further: an
    element too many costs what it differs from nothing, and the mean is over the larger set. Sets that are both
    empty cost 0.

    Args:
        beta: the error β at which the cost of a group's numbers turns from quadratic to linear, by its name in the
            schema, `{"coords": 0.05}`; 1, as published, where not named. Smaller errors cost their square and hardly
            count; with a small β they count in proportion, which makes coordinates precise sooner.
        weights, schema, presence_threshold: of `SetLoss`.

    Raises `setpred.errors.NotFiniteError`; `ValueError` for sets of different sizes without masks; `InputError` for a
    β that is not positive.
    """

    def __init__(
        self,
        *,
        beta: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float | None = None,
    ) -> None:
        super().__init__(weights=weights, schema=schema, presence_threshold=presence_threshold)
        self.beta = dict(beta or {})
        self.grouped |= bool(beta)
        for name, error in self.beta.items():
            if not 0 < error < math.inf:
                raise InputError(f"beta of {name!r}: expected a positive number, got {error}")
        self.register_buffer("_beta", self.by_group(self.beta), persistent=False)

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
        beta = None if self._beta is None else self._beta.to(predicted.dtype)
        # the pairs that are not matched have no gradient: they need not be kept for one
        assignment = hungarian(pairwise_smooth_l1(predicted.detach(), target.detach(), weights, beta), *masks)
        partner = assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, predicted.shape[-1])
        return smooth_l1(predicted.gather(1, partner), target, weights, beta)


def _filled(elements: Tensor, mask: Tensor | None, size: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros up to `size`, and a mask of `largest [batch]` of them: those that are present, then zeros."""
    if mask is None:
        mask = elements.new_ones(elements.shape[:2]).bool()
    missing = size - elements.shape[1]
    elements, mask = functional.pad(elements, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
    lacking = (largest - mask.sum(1)).unsqueeze(1)
    return elements, mask | ((~mask).cumsum(1) <= lacking)
