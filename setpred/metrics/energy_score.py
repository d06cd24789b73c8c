"""Energy score of several predictions of one set: how near they are to the truth, and how far apart."""

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.metrics.averages import MeanMetric
from setpred.metrics.set_distances import positive_cutoff, set_distances


def energy_score(to_truth: Tensor, between: Tensor) -> dict[str, Tensor]:
    """Score samples X_1, …, X_k by their distances from the truth Y and from each other:

        energy = E d(X, Y) - ½ E d(X, X'),    distance = E d(X, Y),    best = min_i d(X_i, Y),    spread = E d(X, X')

    with means over samples, and over pairs of two different ones, so that the expectation of the energy does not depend
    on k (Gneiting, Raftery, JASA 2007; Ferro, QJRMS 2014). Samples of the truth's own distribution have a spread equal
    to the distance in the mean, and an energy of half of it. One answer for all samples has spread 0.

    Args:
        to_truth: d(X_i, Y), `[k, batch]`.
        between: d(X_i, X_j) of pairs i < j, `[pairs, batch]`.

    Returns:
        The four numbers by name, each `[batch]`, in the unit of the distances.
    """
    distance, spread = to_truth.mean(0), between.mean(0)
    return {"energy": distance - 0.5 * spread, "distance": distance, "best": to_truth.amin(0), "spread": spread}


class EnergyScore(MeanMetric):
    """`energy_score` of k predictions with different seeds; d is the distance "hungarian" of `SetDistances`.

    The least energy, in the mean, belongs to the distribution of the truth if d is of negative type. This holds on a
    line; for matched distances in the plane it can fail (Peyré, Cuturi, Computational Optimal Transport, 2019, ch. 8),
    so compare with an answer that is known where there is one, as in `setpred.data.toy.Depths`.

    Args:
        samples: k, at least 2; seeds follow that of the model.
        cutoff: c of `SetDistances`, in units of the positions.

    Raises:
        InputError: a number out of range.
    """

    keys = ("energy", "distance", "best", "spread")
    monitor, mode, higher_is_better = "energy", "min", False

    def __init__(self, *, samples: int = 8, cutoff: float = 1.0) -> None:
        super().__init__()
        if samples < 2:
            raise InputError(f"expected at least 2 samples, got {samples}; the score needs pairs")
        self.samples, self.cutoff = samples, positive_cutoff(cutoff)

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`[samples, batch, n, dim]` and `[batch, m, dim]` to numbers `[batch]`."""
        if predicted.ndim != 4 or len(predicted) != self.samples:
            raise ValueError(f"expected {self.samples} predictions of each set, got {list(predicted.shape)}")

        def distances(ours: Tensor, theirs: Tensor) -> Tensor:
            found = set_distances(ours.flatten(0, 1), theirs.flatten(0, 1), cutoff=self.cutoff)
            return found["hungarian"].unflatten(0, ours.shape[:2])

        first, second = torch.triu_indices(self.samples, self.samples, 1)
        truth = target.expand(self.samples, *target.shape)
        return energy_score(distances(predicted, truth), distances(predicted[first], predicted[second]))
