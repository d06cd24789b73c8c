"""Average precision of predicted sets at distance thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import presence_mask

THRESHOLDS = (math.inf, 1.0, 0.5, 0.25, 0.125, 0.0625)
PAIRS_AT_ONCE = 2**18  # 2 MiB of distances: less time than all at once, and no more memory for more images


def threshold_name(threshold: float) -> str:
    """How a threshold is written in tables, logs and files.

    >>> [threshold_name(threshold) for threshold in THRESHOLDS]
    ['inf', '1', '0.5', '0.25', '0.125', '0.0625']
    """
    return f"{threshold:g}"


def average_precision(
    predicted: Tensor,
    target: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    schema: ElementSchema = CLEVR,
) -> dict[float, float]:
    """Average precision over the whole evaluation set.

    The predictions of all images are ranked by presence, falling; equal ones by (image, slot). There is no cut on
    the confidence: all count. Each looks at the nearest real object of its image whose classes all equal its own
    (equally near ones: the first), and is a true positive if the distance is strictly under the threshold and no
    prediction ranked before has claimed that object at this threshold. There is no second choice. Then

        recall_i = TP_i / objects,  precision_i = TP_i / i,  AP = Σ_i (recall_i − recall_{i−1}) max_{j ≥ i} precision_j

    Args:
        predicted: `[images, set_size, set_dim]`, finite or infinite, never NaN.
        target: `[images, target_size, set_dim]`; the real objects are those whose presence is over one half.
        thresholds: in the units of the continuous fields (`Field.scale` is undone); `math.inf` asks only for the
            classes, and for a finite distance.

    Returns:
        {threshold: AP as a fraction}; NaN where no image has a real object, for then recall has no meaning.

    Raises:
        ValueError: wrong shapes, a threshold that is not positive, NaN in a prediction or in a real object.

    >>> cube = CLEVR.encode([dict(coords=(3, 0, 0.7), material="metal", color="red", shape="cube", size="large")])
    >>> target = torch.from_numpy(cube)[None]
    >>> predicted = target.clone()
    >>> predicted[..., 0] += 0.1  # 0.3 in CLEVR's units
    >>> average_precision(predicted, target, thresholds=(0.5, 0.25))
    {0.5: 1.0, 0.25: 0.0}
    """
    _check_thresholds(thresholds)
    ranking = _rank(predicted, target, schema)
    return {threshold: _area(_true_positives(ranking, threshold), ranking.objects) for threshold in thresholds}


def average_precision_per_image(
    predicted: Tensor,
    target: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    schema: ElementSchema = CLEVR,
) -> dict[float, float]:
    """Mean over the images of each image's own average precision: the protocol of the published iDSPN code.

    Within an image the predictions are taken by presence, falling (equal ones by slot). Each takes the nearest
    real object with all its classes that none before it took, and that object is gone, even when the distance is
    over every threshold; so there is a second choice, and one claim for all thresholds. At an infinite distance
    nothing is taken. Recall, precision and area are those of `average_precision`, within the image. Images without
    real objects have no recall and are left out of the mean. Arguments, result and errors as in `average_precision`.
    """
    _check_thresholds(thresholds)
    check_pair(predicted, target, schema)
    claimed = torch.cat([_claim_in_turn(*block, schema) for block in _blocks(predicted, target)])
    objects = presence_mask(target).sum(1)
    images = int((objects > 0).sum())
    rank = torch.arange(1, claimed.shape[1] + 1, device=claimed.device, dtype=torch.float64)

    def mean_area(threshold: float) -> float:
        hit = claimed < threshold
        envelope = (hit.cumsum(1) / rank).flip(1).cummax(1).values.flip(1) if hit.numel() else hit.double()
        return math.fsum((envelope / objects[:, None])[hit].tolist()) / images if images else math.nan

    return {threshold: mean_area(threshold) for threshold in thresholds}


def precision_recall(
    predicted: Tensor, target: Tensor, threshold: float, *, schema: ElementSchema = CLEVR
) -> tuple[Tensor, Tensor]:
    """The curve under which `average_precision` is the area: recall and precision after each ranked prediction.

    Both float64 `[images * set_size]`, as they come, before the precision is made to fall monotonically.
    """
    _check_thresholds([threshold])
    ranking = _rank(predicted, target, schema)
    right = torch.zeros_like(ranking.distance)
    right[_true_positives(ranking, threshold)] = 1.0
    right = right.cumsum(0)
    return right / ranking.objects, right / torch.arange(1, len(right) + 1, device=right.device)


@dataclass(frozen=True)
class _Ranking:
    """All predictions, most confident first: the distance to the object each looks at, and which that is."""

    distance: Tensor  # [images * set_size] float64, inf where no object has the classes
    aim: Tensor  # [images * set_size], index of the object among all target slots
    slots: int  # target slots of all images
    objects: int  # how many of them are real


def _rank(predicted: Tensor, target: Tensor, schema: ElementSchema) -> _Ranking:
    check_pair(predicted, target, schema)
    found = [_nearest(*_compare(*block, schema)) for block in _blocks(predicted, target)]
    distance, nearest = map(torch.cat, zip(*found, strict=True))
    images, target_size = len(target), max(1, target.shape[1])
    aim = nearest + target_size * torch.arange(images, device=nearest.device)[:, None]
    order = predicted[..., -1].flatten().argsort(descending=True, stable=True)
    objects = int(presence_mask(target).sum())
    return _Ranking(distance.flatten()[order], aim.flatten()[order], images * target_size, objects)


def _true_positives(ranking: _Ranking, threshold: float) -> Tensor:
    """Ranks of the true positives, rising: for each object the first prediction that hits it."""
    (rank,) = (ranking.distance < threshold).nonzero(as_tuple=True)
    never = len(ranking.distance)
    first = torch.full((ranking.slots,), never, device=rank.device).scatter_reduce(
        0, ranking.aim[rank], rank, reduce="amin"
    )
    return first[first < never].sort().values


def _area(true_positives: Tensor, objects: int) -> float:
    """Area under the curve. Recall grows, by 1 / objects, and precision peaks at the true positives alone.

    fsum is exact before its one rounding, so that the result does not depend on how the sum is taken.
    """
    if not objects:
        return math.nan
    precision = torch.arange(1, len(true_positives) + 1, device=true_positives.device) / (true_positives.double() + 1)
    envelope = precision.flip(0).cummax(0).values
    return math.fsum(envelope.tolist()) / objects


def pairwise_distance(predicted: Tensor, target: Tensor, *, schema: ElementSchema = CLEVR) -> Tensor:
    """L2 distance over the continuous fields, in their units: float64 `[images, set_size, target_size]`."""
    squared = predicted.new_zeros(*predicted.shape[:2], target.shape[1], dtype=torch.float64)
    for field in schema.continuous:
        # double precision before the scale, and of these numbers alone
        mine, theirs = (field.scale * each[..., schema.slice(field.name)].double() for each in (predicted, target))
        for a, b in zip(mine.unbind(-1), theirs.unbind(-1), strict=True):
            squared += (a[:, :, None] - b[:, None]).square_()
    return squared.sqrt_()


def _blocks(predicted: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some images at a time."""
    images = max(1, PAIRS_AT_ONCE // max(1, predicted.shape[1] * target.shape[1]))
    return zip(predicted.split(images), target.split(images), strict=True)


def _compare(predicted: Tensor, target: Tensor, schema: ElementSchema) -> tuple[Tensor, Tensor]:
    """Distance (float64) and whether real and of the same classes (bool), both `[images, set_size, target_size]`."""
    if target.shape[1] == 0:  # one absent object, so that there is a nearest
        target = target.new_zeros(len(target), 1, schema.set_dim)
    distance = pairwise_distance(predicted, target, schema=schema)
    candidate = presence_mask(target)[:, None].expand_as(distance)
    mine = predicted.new_zeros(predicted.shape[:2], dtype=torch.long)
    theirs = target.new_zeros(target.shape[:2], dtype=torch.long)
    for field in schema.categorical:  # all classes as one number
        mine = mine * field.size + schema.values(predicted, field.name)
        theirs = theirs * field.size + schema.values(target, field.name)
    return distance, candidate & (mine[:, :, None] == theirs[:, None])


def _nearest(distance: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest candidate along the last axis, the first of equals; inf where none."""
    nearest = torch.where(candidate, distance, math.inf).min(-1)
    return nearest.values, nearest.indices


def _claim_in_turn(predicted: Tensor, target: Tensor, schema: ElementSchema) -> Tensor:
    """Distance `[images, set_size]` to the object each takes, most confident first, from those left; inf if none is."""
    order = predicted[..., -1].argsort(dim=1, descending=True, stable=True)[..., None]
    distance, candidate = (each.gather(1, order.expand_as(each)) for each in _compare(predicted, target, schema))
    free = candidate.new_ones(len(candidate), candidate.shape[-1])
    claimed = torch.full_like(distance[..., 0], math.inf)
    for turn in range(distance.shape[1]):
        claimed[:, turn], index = _nearest(distance[:, turn], candidate[:, turn] & free)
        index, taken = index[:, None], claimed[:, turn, None].isfinite()
        free.scatter_(1, index, free.gather(1, index) & ~taken)
    return claimed


def _check_thresholds(thresholds: Sequence[float]) -> None:
    for threshold in thresholds:
        if not threshold > 0:
            raise ValueError(f"expected thresholds over 0 (math.inf for none), got {threshold}")


def check_pair(predicted: Tensor, target: Tensor, schema: ElementSchema) -> None:
    """Raises `ValueError` unless the two are finite enough sets of the same images."""
    for name, elements in (("predicted", predicted), ("target", target)):
        if elements.ndim != 3 or elements.shape[-1] != schema.set_dim or not elements.is_floating_point():
            shape = f"[images, set_size, {schema.set_dim}]"
            raise ValueError(f"expected floating point {name} {shape}, got {elements.dtype} {list(elements.shape)}")
    if len(predicted) != len(target):
        raise ValueError(f"expected as many predicted sets as targets, got {len(predicted)} and {len(target)}")
    if predicted.sum().isfinite() and target.sum().isfinite():
        return  # so is every number; any other sum is looked into
    broken = predicted.isnan().flatten(1).any(1)
    if broken.any():
        first, count = int(broken.nonzero()[0]), int(broken.sum())
        raise InputError(f"expected predictions without NaN, got NaN in {count} images, first image {first}")
    real = presence_mask(target)
    broken = target[..., -1].isnan().any(1) | (real & ~target.isfinite().all(-1)).any(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise InputError(f"expected targets with finite real objects, got others, first in image {first}")


class AveragePrecision(Metric):
    """An average precision gathered over batches: a shell around the pure functions.

    `update(predicted, target)` keeps the sets, `compute()` gives {"ap_inf": ..., "ap_1": ..., ...} and "ap", the mean
    of these, as float64 scalars, equal to the function on all images at once, however they were batched.

    Args:
        protocol: `average_precision` or `average_precision_per_image`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    monitor, mode = "ap", "max"  # what says which of two models is better

    def __init__(
        self,
        protocol: Callable[..., dict[float, float]] = average_precision,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        schema: ElementSchema = CLEVR,
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.thresholds = tuple(thresholds)
        self.schema = schema
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        check_pair(predicted, target, self.schema)
        self.predicted.append(predicted.detach())
        self.target.append(target.detach())

    def compute(self) -> dict[str, Tensor]:
        predicted, target = dim_zero_cat(self.predicted), dim_zero_cat(self.target)
        scores = self.protocol(predicted, target, thresholds=self.thresholds, schema=self.schema)
        result = {f"ap_{threshold_name(t)}": torch.tensor(score, dtype=torch.float64) for t, score in scores.items()}
        return result | {"ap": torch.stack(list(result.values())).mean()}
