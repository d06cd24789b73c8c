"""How far predicted points lie from the real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.matching import check_pair, hungarian
from setpred.metrics.averages import MeanMetric
from setpred.sets import presence_mask


class SetDistances(MeanMetric):
    """Distances of the present predicted points P and the present real points T, averaged over the examples:

        chamfer = ½ [ (1/|T|) Σ_t min_p d(p, t) + (1/|P|) Σ_p min_t d(p, t) ]
        hungarian = (1/max(|P|, |T|)) [ min_π Σ d(p_π(t), t) + c | |P| - |T| | ]

    with d(p, t) = min(|p - t|, c) and π the pairs of a best one-to-one matching, as many as the smaller set allows; the
    second is the OSPA distance of order 1 (Schuhmacher, Vo, Vo, 2008), which sees points too many and too few. An
    element is present where its last number is over one half; the others are its position.

    The cutoff c is what a point without a partner costs, and no point costs more, so every pair of sets has a finite
    distance of at most c. Where one set is empty and the other is not both distances are c; two empty sets are at 0.

    Args:
        cutoff: c, in units of the positions.

    Raises:
        NotFiniteError: NaN in a present point.

    >>> point = torch.tensor([[[0.5, 0.0, 1.0]]])
    >>> SetDistances()(point + torch.tensor([0.0, 0.25, 0.0]), point)["chamfer"]
    tensor(0.2500, dtype=torch.float64)
    """

    keys = ("chamfer", "hungarian")
    monitor, mode = "chamfer", "min"
    higher_is_better = False

    def __init__(self, *, cutoff: float = 1.0) -> None:
        if cutoff <= 0:
            raise InputError(f"expected a positive cutoff, got {cutoff}; give a distance in units of the positions")
        super().__init__()
        self.cutoff = cutoff

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_pair(predicted, target)
        here, there = presence_mask(predicted), presence_mask(target)
        apart = predicted[:, :, None, :-1].double() - target[:, None, :, :-1].double()
        distance = apart.square().sum(-1).sqrt().clamp(max=self.cutoff)
        distance = torch.where(here[:, :, None] & there[:, None, :], distance, self.cutoff)
        n, m = here.sum(1), there.sum(1)
        chosen = hungarian(distance, here, there)
        matched = distance.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1)
        matched = matched.masked_fill(chosen < 0, 0.0).sum(1) + self.cutoff * (n - m).abs()
        nearest = [_mean(distance.amin(1), there), _mean(distance.amin(2), here)]
        one_empty = (n == 0) != (m == 0)
        return {
            "chamfer": (0.5 * sum(nearest)).masked_fill(one_empty, self.cutoff),
            "hungarian": matched / n.maximum(m).clamp(min=1),
        }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the present ones, `[batch]`; 0 where there are none."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
