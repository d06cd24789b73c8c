"""Scores of several predictions of one set: how near they are to the truth, and how far apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.metrics.average_precision import GatheredSets, average_precision, threshold_name
from setpred.metrics.averages import MeanMetric
from setpred.metrics.set_distances import positive_cutoff, set_distances
from setpred.schema import ElementSchema


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
        self.samples, self.cutoff = at_least_two(samples), positive_cutoff(cutoff)

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`[samples, batch, n, dim]` and `[batch, m, dim]` to numbers `[batch]`."""
        return energy_score(*sample_distances(predicted, target, samples=self.samples, cutoff=self.cutoff))


class SampledPrecision(GatheredSets):
    """Average precision and energy score of k predictions with different seeds, for scenes with several answers:

        ap           of all samples, each as one answer
        medoid_ap    of one answer: the sample of least mean distance from the others
        best_ap      of the sample nearest to the truth, which only the truth can choose
        energy, distance, spread    of `energy_score`

    The precision is `average_precision`, the distance "hungarian" of `SetDistances` over all numbers of an element in
    the scale of the model, classes included. The medoid has the least expected distance among the samples, as the
    answer of a minimum Bayes risk decoder. A decoder of one answer has equal scores for all three, but for ties.

    Args:
        samples: k, at least 2; seeds follow that of the model.
        thresholds: of the precision, in units of the schema.
        cutoff: c of `SetDistances`. Elements with two different classes are 2 apart.
        schema: of the elements; that of the task by default.

    Raises:
        InputError: a number out of range.
    """

    monitor, mode, higher_is_better = "energy", "min", False  # the proper score: AP is best for a sure model

    def __init__(
        self,
        *,
        samples: int = 8,
        thresholds: Sequence[float] = (math.inf, 0.5),
        cutoff: float = 2.0,
        schema: ElementSchema | None = None,
    ) -> None:
        super().__init__(schema)
        self.samples, self.cutoff, self.thresholds = at_least_two(samples), positive_cutoff(cutoff), tuple(thresholds)
        if not self.thresholds or not all(threshold > 0 for threshold in self.thresholds):
            raise InputError(f"expected thresholds over 0, got {list(self.thresholds)}; give at least one")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Keep samples `[samples, batch, n, dim]` and the truth `[batch, m, dim]`."""
        check_samples(predicted, self.samples)
        super().update(predicted.transpose(0, 1).flatten(1, 2), target)

    def compute(self) -> dict[str, Tensor]:
        predicted, target = self.sets()
        samples = predicted.unflatten(1, (self.samples, -1)).transpose(0, 1)
        to_truth, between = sample_distances(samples, target, samples=self.samples, cutoff=self.cutoff)
        first, second = torch.triu_indices(self.samples, self.samples, 1)
        apart = between.new_zeros(self.samples, self.samples, len(target))
        apart[first, second] = apart[second, first] = between
        number, found = torch.arange(len(target), device=target.device), {}
        answers = {
            "": (samples.flatten(0, 1), target.repeat(self.samples, 1, 1)),
            "medoid_": (samples[apart.sum(0).argmin(0), number], target),
            "best_": (samples[to_truth.argmin(0), number], target),
        }
        for name, sets in answers.items():
            scores = average_precision(*sets, thresholds=self.thresholds, schema=self.schema)
            found |= {f"{name}ap_{threshold_name(threshold)}": score for threshold, score in scores.items()}
            found |= {f"{name}ap": sum(scores.values()) / len(scores)}
        energies = energy_score(to_truth, between)
        found |= {name: energies[name].mean() for name in ("energy", "distance", "spread")}
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


def at_least_two(samples: int) -> int:
    """Return a number of samples; raise `InputError` if it has no pairs."""
    if not isinstance(samples, int) or samples < 2:
        raise InputError(f"expected at least 2 samples, got {samples}; the score needs pairs")
    return samples


def check_samples(predicted: Tensor, samples: int) -> None:
    """Raise `ValueError` unless there are as many predictions of each set, `[samples, batch, n, dim]`."""
    if predicted.ndim != 4 or len(predicted) != samples:
        raise ValueError(f"expected {samples} predictions of each set, got {list(predicted.shape)}")


def sample_distances(predicted: Tensor, target: Tensor, *, samples: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Compute the two arguments of `energy_score` for `[samples, batch, n, dim]` and `[batch, m, dim]`."""
    check_samples(predicted, samples)

    def distances(ours: Tensor, theirs: Tensor) -> Tensor:
        found = set_distances(ours.flatten(0, 1), theirs.flatten(0, 1), cutoff=cutoff)
        return found["hungarian"].unflatten(0, ours.shape[:2])

    first, second = torch.triu_indices(samples, samples, 1)
    truth = target.expand(samples, *target.shape)
    return distances(predicted, truth), distances(predicted[first], predicted[second])
