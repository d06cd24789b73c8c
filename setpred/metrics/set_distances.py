"""Distances between predicted and real sets of points."""

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.matching import check_pair, hungarian
from setpred.metrics.averages import MeanMetric
from setpred.sets import mean_present, presence_mask


def positive_cutoff(cutoff: float) -> float:
    """Return a cutoff; raise `InputError` unless it is positive."""
    if cutoff <= 0:
        raise InputError(f"expected a positive cutoff, got {cutoff}; give a distance in units of the positions")
    return cutoff


def set_distances(predicted: Tensor, target: Tensor, *, cutoff: float) -> dict[str, Tensor]:
    """Compute the distances of `SetDistances` for each example, float64 `[batch]`."""
    check_pair(predicted, target)
    here, there = presence_mask(predicted), presence_mask(target)
    apart = predicted[:, :, None, :-1].double() - target[:, None, :, :-1].double()
    distance = apart.square().sum(-1).sqrt().clamp(max=cutoff)
    distance = torch.where(here[:, :, None] & there[:, None, :], distance, cutoff)
    n, m = here.sum(1), there.sum(1)
    chosen = hungarian(distance, here, there)
    matched = distance.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(chosen < 0, 0.0).sum(1)
    chamfer = 0.5 * (mean_present(distance.amin(1), there) + mean_present(distance.amin(2), here))
    return {
        "chamfer": chamfer.masked_fill((n == 0) != (m == 0), cutoff),
        "hungarian": (matched + cutoff * (n - m).abs()) / n.maximum(m).clamp(min=1),
    }


class SetDistances(MeanMetric):
    """Distances of the present predicted points P and the present real points T, averaged over examples:

        chamfer = ½ [ (1/|T|) Σ_t min_p d(p, t) + (1/|P|) Σ_p min_t d(p, t) ]
        hungarian = (1/max(|P|, |T|)) [ min_π Σ d(p_π(t), t) + c | |P| - |T| | ]

    with d(p, t) = min(|p - t|, c) and π a one-to-one matching of as many pairs as the smaller set allows. The second is
    the OSPA distance of order 1 (Schuhmacher, Vo, Vo, 2008), which counts surplus and missing points. An element is
    present if its last number is above one half; the others are its position.

    The cutoff c is the cost of a point without a partner, and the most a point costs, so all distances are at most c.
    Both are c if exactly one set is empty, and 0 if both are.

    Args:
        cutoff: c, in units of the positions.

    Raises:
        NotFiniteError: NaN in a present point.

    >>> point = torch.tensor([[[0.5, 0.0, 1.0]]])
    >>> SetDistances()(point + torch.tensor([0.0, 0.25, 0.0]), point)["chamfer"]
    tensor(0.2500, dtype=torch.float64)
    """

    keys = ("chamfer", "hungarian")
    monitor, mode, higher_is_better = "chamfer", "min", False

    def __init__(self, *, cutoff: float = 1.0) -> None:
        super().__init__()
        self.cutoff = positive_cutoff(cutoff)

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        return set_distances(predicted, target, cutoff=self.cutoff)
