"""Hungarian loss, of the best one-to-one matching."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from setpred.errors import InputError
from setpred.losses.base import Mask, SetLoss
from setpred.matching import hungarian, pairwise_smooth_l1, smooth_l1
from setpred.sets import mean_present, set_sizes


class HungarianLoss(SetLoss):
    """min_π (1/m) Σ_j mean_d w_d smooth_L1(predicted_π(j) - target_j; β_d), the minimum over one-to-one matchings.

    The loss of the published iDSPN (Zhang et al., ICLR 2022); Slot Attention's (Locatello et al., NeurIPS 2020) is m
    times as large. Padding takes part: a target of zeros trains a prediction towards zeros, presence included. With
    masks, the smaller set is filled up with zeros to the size of the larger one, which the mean divides by; two empty
    sets cost 0. The gradient holds the matching fixed.

    Args:
        beta: error β at which the cost of a group turns from quadratic to linear, by its name in the schema:
            `{"coords": 0.05}`; 1, as published, by default. With a small β, coordinates become precise sooner.
        quantiles: level τ, from 0 to 1, of the groups whose predictions are quantiles of their targets, by name in the
            schema: `{"low": 0.05, "high": 0.95}`. They cost the pinball loss max(τ e, (τ - 1) e) of the error e =
            target - prediction, as in MIST (Gritsai et al., 2025), which is least, on average, at the τ-quantile.
            Such fields repeat the numbers of another one, so that the data need no further change.
        only_present: groups that cost nothing where the target is padding (presence at most one half). Then
            predictions of small confidence may be anywhere, as DETR's; otherwise their numbers are drawn to zero.
        aligned: in training, the elements stay in their order, for a decoder that has matched them: `FlowMatching`.
        common: `weights`, `schema` and `presence_threshold` of `SetLoss`.

    Raises:
        InputError: a β that is not positive, a level that is not between 0 and 1.
        NotFiniteError: a matching cost that is not finite.
        ValueError: sets of different sizes without masks.
    """

    def __init__(
        self,
        *,
        beta: Mapping[str, float] | None = None,
        quantiles: Mapping[str, float] | None = None,
        only_present: Sequence[str] = (),
        aligned: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.aligned = aligned
        self.beta, self.quantiles, self.only_present = dict(beta or {}), dict(quantiles or {}), tuple(only_present)
        self.grouped |= bool(beta) or bool(quantiles) or bool(only_present)
        for name, error in self.beta.items():
            if not 0 < error < math.inf:
                raise InputError(f"beta of {name!r}: expected a positive number, got {error}")
        for name, level in self.quantiles.items():
            if not 0 < level < 1:
                raise InputError(f"quantile of {name!r}: expected a level between 0 and 1, got {level}")
        self._place_groups()

    def _place_groups(self) -> None:
        super()._place_groups()
        self.register_buffer("_beta", self.by_group(self.beta), persistent=False)
        self.register_buffer("_levels", self.by_group(self.quantiles), persistent=False)  # 1: no quantile
        self.register_buffer("_padding", self.by_group(dict.fromkeys(self.only_present, 0.0)), persistent=False)

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        if predicted_mask is None and target_mask is None:
            if predicted.shape[1] != target.shape[1]:
                raise ValueError(
                    f"expected sets of one size, padded, got {predicted.shape[1]} predicted and {target.shape[1]} "
                    "target elements; predictions left over would cost nothing"
                )
            return self._matched_cost(predicted, target).mean(-1)
        size = max(predicted.shape[1], target.shape[1])
        largest = set_sizes(predicted, predicted_mask).maximum(set_sizes(target, target_mask))
        predicted, predicted_mask = _filled(predicted, predicted_mask, size, largest)
        target, target_mask = _filled(target, target_mask, size, largest)
        return mean_present(self._matched_cost(predicted, target, predicted_mask, target_mask), target_mask)

    def _matched_cost(self, predicted: Tensor, target: Tensor, *masks: Tensor) -> Tensor:
        """Cost of each target element and its prediction, `[batch, m]`; arbitrary for absent elements."""
        weights = self.element_weights(predicted)
        beta, levels = (None if each is None else each.to(predicted.dtype) for each in (self._beta, self._levels))
        # without a graph for the pairs that are not matched, whose gradient is zero
        costs = pairwise_smooth_l1(predicted.detach(), target.detach(), weights, beta, levels)
        if self._padding is not None:
            of_padding = self._padding.to(predicted.dtype) * (1.0 if weights is None else weights)
            padding = target[..., -1:] <= 0.5
            target = target.masked_fill(padding, 0.0)
            alone = smooth_l1(predicted.detach(), torch.zeros_like(predicted), of_padding, beta, levels)
            costs = torch.where(padding.mT, alone.unsqueeze(-1), costs)
            weights = torch.where(padding, of_padding, torch.ones_like(of_padding) if weights is None else weights)
        if not (self.aligned and self.training):
            assignment = hungarian(costs, *masks)
            predicted = predicted.gather(1, assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, predicted.shape[-1]))
        return smooth_l1(predicted, target, weights, beta, levels)


def _filled(elements: Tensor, mask: Mask, size: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Pad a set with zeros to `size`, and mask `largest [batch]` of its elements: the present ones, then zeros."""
    if mask is None:
        mask = elements.new_ones(elements.shape[:2]).bool()
    missing = size - elements.shape[1]
    elements, mask = functional.pad(elements, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
    lacking = (largest - mask.sum(1)).unsqueeze(1)
    return elements, mask | ((~mask).cumsum(1) <= lacking)
