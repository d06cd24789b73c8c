"""Distances between predicted and real sets of points."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.losses.soft_equivariance import SYMMETRIES, moved
from setpred.matching import check_pair, hungarian, transport_cost
from setpred.metrics.average_precision import GatheredSets
from setpred.metrics.averages import MeanMetric
from setpred.schema import ElementSchema
from setpred.sets import check_set, fill_absent, mean_present, presence_mask


def positive_cutoff(cutoff: float) -> float:
    """Return a cutoff; raise `InputError` unless it is positive."""
    if not cutoff > 0:
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


def symmetry_distances(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    mask: Tensor | None = None,
    *,
    symmetry: str,
    dims: int,
    cutoff: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute d(f(g x), g f(x)) of each example, and d(f(x), f(x')) of each and the one before: `[batch]` twice.

    d is the distance "hungarian" of `SetDistances`, in units of the positions: how far a prediction is off because the
    input was moved, and how far apart predictions of different inputs are. Unlike `setpred.losses.equivariance_error`
    it knows absent elements, and g is about the mean of all present positions of `inputs`, with their root mean square
    distance from it, over all coordinates, as the unit of a translation.

    Args:
        predict: f, inputs to `[batch, n, dims + 1]`: positions and presence.
        inputs, mask: x `[batch, m, input_dim]` and bool `[batch, m]`; at least two examples.
        symmetry: see `setpred.losses.equivariance_error`.
        dims: how many of the first numbers of an element of the input, and of the output, are its position.
        cutoff: c of `SetDistances`.

    Raises:
        InputError: an unknown symmetry, or a rotation of one number; fewer numbers than `dims`, a single example, or
            fewer than two present elements.
    """
    check_set(inputs, mask)
    least = 1 + (symmetry == "rotation")
    if symmetry not in SYMMETRIES or not least <= dims <= inputs.shape[-1] or len(inputs) < 2:
        raise InputError(
            f"expected one of {', '.join(SYMMETRIES)}, positions of {least} to {inputs.shape[-1]} numbers and two "
            f"examples, got {symmetry}, {dims} and {len(inputs)}"
        )
    rows = inputs[..., :dims].flatten(0, 1) if mask is None else inputs[..., :dims][mask]
    if len(rows) < 2:
        raise InputError(f"expected at least two present elements in the inputs, got {len(rows)}; give more examples")
    centre = rows.mean(0)
    unit = (rows - centre).square().mean().sqrt()
    matrix, shift = SYMMETRIES[symmetry](len(inputs), dims, inputs)
    # about the centre: x goes to c + (x - c) A + b, and `moved` knows the origin alone
    motion = matrix, unit * shift + centre - (centre @ matrix).unsqueeze(1)
    here = predict(fill_absent(inputs, mask))
    there = predict(moved(inputs, motion, mask))
    expected = moved(here, tuple(part.to(here.dtype) for part in motion))
    return tuple(
        set_distances(*pair, cutoff=cutoff)["hungarian"] for pair in ((there, expected), (here, here.roll(1, 0)))
    )


class ClassWasserstein(GatheredSets):
    """Wasserstein distance between the predicted and the real points of each class, exactly (`transport_cost`):

        W_c = min_P Σ_ij P_ij min(|p_i - t_j|, c),    P with the uniform measures over both sets as its margins

    p are the positions of the predicted elements with a presence over one half whose greatest score is that of the
    class, t those of its real elements, in the units of the schema's `position`. If one of the two is empty, W_c is the
    cutoff c. Images where both are do not count for the class. Unlike `SetDistances`, a missing or a surplus point
    costs only what it takes to spread the mass over the others, and a point of another class helps nobody.

    `compute()` gives "wasserstein", the mean over all images and their classes, and "wasserstein_<class>" of each
    class, NaN for one that does not occur.

    Args:
        field: field of the classes; the label of the schema unless given.
        cutoff: c; the largest finite threshold of the schema unless given.
        schema: of the elements; that of the task by default.

    Raises:
        InputError: a cutoff that is not positive; on use, a schema without this field, or without a single label.
    """

    monitor, mode, higher_is_better = "wasserstein", "min", False

    def __init__(
        self, *, field: str | None = None, cutoff: float | None = None, schema: ElementSchema | None = None
    ) -> None:
        super().__init__(schema)
        if cutoff is not None and not cutoff > 0:
            raise InputError(f"expected a positive cutoff, got {cutoff}; give a distance in units of the positions")
        self.field, self.cutoff = field, cutoff

    def compute(self) -> dict[str, Tensor]:
        fields = [field for field in self.schema.categorical if field.name == self.field]
        fields = list(self.schema.label) if self.field is None else fields
        if len(fields) != 1:
            names = ", ".join(field.name for field in self.schema.categorical) or "none here"
            raise InputError(f"ClassWasserstein: expected a field of classes ({names}), got {self.field}; pass field")
        cutoff = self.cutoff or next(each for each in self.schema.thresholds if math.isfinite(each))
        sides = []
        for elements in self.sets():
            places = [self.schema.values(elements.double(), each.name) for each in self.schema.position]
            classes = self.schema.values(elements, fields[0].name).masked_fill(~presence_mask(elements), -1)
            sides.append((torch.cat(places, -1), classes))
        (places, kinds), (real_places, real_kinds) = sides
        scores: dict[str, list[float]] = {}
        for number, name in enumerate(fields[0].classes):
            scores[name] = []
            for p, here, t, there in zip(places, kinds == number, real_places, real_kinds == number, strict=True):
                if here.any() and there.any():
                    scores[name].append(transport_cost(torch.cdist(p[here], t[there]).clamp(max=cutoff)))
                elif here.any() or there.any():
                    scores[name].append(cutoff)
        found = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
        means = {f"wasserstein_{name}": values.mean() for name, values in found.items()}
        return {"wasserstein": torch.cat(list(found.values())).mean()} | means
