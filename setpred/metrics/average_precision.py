"""Average precision of predicted sets at distance thresholds."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from setpred.errors import InputError
from setpred.schema import ElementSchema, Field
from setpred.sets import presence_mask

THRESHOLDS = (math.inf, 1.0, 0.5, 0.25, 0.125, 0.0625)
PAIRS_AT_ONCE = 2**18  # 2 MiB of distances: faster than all at once, and the memory does not grow with the images


def threshold_name(threshold: float) -> str:
    """Text of a threshold in tables, logs and files.

    >>> [threshold_name(threshold) for threshold in THRESHOLDS]
    ['inf', '1', '0.5', '0.25', '0.125', '0.0625']
    """
    return f"{threshold:g}"


def average_precision(
    predicted: Tensor, target: Tensor, *, thresholds: Sequence[float] | None = None, schema: ElementSchema
) -> dict[float, float]:
    """Average precision over all images together.

    The predictions of all images are ranked by presence, without a cut, largest first; equal ones by (image, slot).
    Each aims at the nearest real object of its image with all its classes (of equally near ones, the first), and with
    the fields that have a `Field.tolerance` within it. It is a
    true positive if the distance is strictly under the threshold and no prediction ranked before has claimed that
    object at this threshold. There is no second choice. Then

        recall_i = TP_i / objects,  precision_i = TP_i / i,  AP = Σ_i (recall_i − recall_{i−1}) max_{j ≥ i} precision_j

    Args:
        predicted: `[images, set_size, set_dim]`, finite or infinite, never NaN.
        target: `[images, target_size, set_dim]`; the real objects are those whose presence is over one half.
        thresholds: in the units of the continuous fields (`Field.scale` is undone), the schema's by default;
            `math.inf` asks only for the classes and a finite distance.

    Returns:
        {threshold: AP as a fraction}; NaN if no image has a real object, since recall is undefined then.

    Raises:
        ValueError: wrong shapes, a threshold that is not positive, NaN in a prediction or in a real object.

    >>> from setpred import CLEVR
    >>> cube = CLEVR.encode([dict(coords=(3, 0, 0.7), material="metal", color="red", shape="cube", size="large")])
    >>> target = torch.from_numpy(cube)[None]
    >>> predicted = target.clone()
    >>> predicted[..., 0] += 0.1  # 0.3 in CLEVR's units
    >>> average_precision(predicted, target, thresholds=(0.5, 0.25), schema=CLEVR)
    {0.5: 1.0, 0.25: 0.0}
    """
    thresholds = schema.thresholds if thresholds is None else thresholds
    true_positives, objects = _true_positives(predicted, target, thresholds, schema)

    def area(ranks: Tensor) -> float:
        """Area under the curve: recall grows by 1 / objects at the true positives alone, where precision peaks."""
        precision = torch.arange(1, len(ranks) + 1, device=ranks.device) / (ranks.double() + 1)
        # fsum rounds once, so the result does not depend on the order of the sum
        return math.fsum(precision.flip(0).cummax(0).values.tolist()) / objects if objects else math.nan

    return {threshold: area(ranks) for threshold, ranks in zip(thresholds, true_positives, strict=True)}


def average_precision_per_image(
    predicted: Tensor, target: Tensor, *, thresholds: Sequence[float] | None = None, schema: ElementSchema
) -> dict[float, float]:
    """Mean over images of the average precision of each image: the protocol of the published iDSPN code.

    The predictions of an image claim objects in turn, ranked by presence, largest first (equal ones by slot). Each
    claims the nearest free real object with all its classes, even beyond every threshold, except at an infinite
    distance. So there is a second choice, and one claim for all thresholds. The mean omits images without real objects.
    Recall, precision, area, arguments, result and errors are those of `average_precision`.
    """
    thresholds = schema.thresholds if thresholds is None else thresholds
    check_scorable(predicted, target, schema, thresholds)
    claimed = torch.cat([_claim_in_turn(*block, schema) for block in blocks(predicted, target)])
    objects = presence_mask(target).sum(1)
    images = int((objects > 0).sum())
    rank = torch.arange(1, claimed.shape[1] + 1, device=claimed.device, dtype=torch.float64)

    def mean_area(threshold: float) -> float:
        hit = claimed < threshold
        envelope = (hit.cumsum(1) / rank).flip(1).cummax(1).values.flip(1) if hit.numel() else hit.double()
        return math.fsum((envelope / objects[:, None])[hit].tolist()) / images if images else math.nan

    return {threshold: mean_area(threshold) for threshold in thresholds}


def precision_recall(
    predicted: Tensor, target: Tensor, threshold: float, *, schema: ElementSchema
) -> tuple[Tensor, Tensor]:
    """Recall and precision after each ranked prediction: the curve whose area is `average_precision`.

    Both are float64 `[images * set_size]`, before the precision is made to fall monotonically.
    """
    (true_positives,), objects = _true_positives(predicted, target, [threshold], schema)
    right = torch.zeros(predicted.shape[0] * predicted.shape[1], dtype=torch.float64, device=predicted.device)
    right[true_positives] = 1.0
    right = right.cumsum(0)
    return right / objects, right / torch.arange(1, len(right) + 1, device=right.device)


def true_positives(predicted: Tensor, target: Tensor, threshold: float, *, schema: ElementSchema) -> Tensor:
    """Whether each prediction is a true positive of `average_precision` at a threshold: bool `[images, set_size]`."""
    (ranks,), _ = _true_positives(predicted, target, [threshold], schema)
    order = predicted[..., -1].flatten().argsort(descending=True, stable=True)
    right = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    right[order[ranks]] = True
    return right.view(predicted.shape[:2])


def _true_positives(
    predicted: Tensor, target: Tensor, thresholds: Sequence[float], schema: ElementSchema
) -> tuple[list[Tensor], int]:
    """Ranks of the true positives at each threshold, rising, and the number of real objects."""
    check_scorable(predicted, target, schema, thresholds)
    found = [_nearest(*_compare(*block, schema)) for block in blocks(predicted, target)]
    distance, nearest = map(torch.cat, zip(*found, strict=True))
    images, target_size = len(target), max(1, target.shape[1])
    aim = nearest + target_size * torch.arange(images, device=nearest.device)[:, None]  # among all target slots
    order = predicted[..., -1].flatten().argsort(descending=True, stable=True)
    distance, aim, never = distance.flatten()[order], aim.flatten()[order], len(order)
    ranks = []
    for threshold in thresholds:
        (rank,) = (distance < threshold).nonzero(as_tuple=True)
        first = torch.full((images * target_size,), never, device=rank.device)
        first = first.scatter_reduce(0, aim[rank], rank, reduce="amin")
        ranks.append(first[first < never].sort().values)
    return ranks, int(presence_mask(target).sum())


def pairwise_distance(predicted: Tensor, target: Tensor, *, schema: ElementSchema) -> Tensor:
    """L2 distance over the schema's `position`, in its units: float64 `[images, set_size, target_size]`."""
    squared = predicted.new_zeros(*predicted.shape[:2], target.shape[1], dtype=torch.float64)
    for field in schema.position:
        # double precision before the scale, for these numbers only
        mine, theirs = (each[..., schema.slice(field.name)].double() for each in (predicted, target))
        mine, theirs = (field.read(each) if field.period else field.scale * each for each in (mine, theirs))
        for a, b in zip(mine.unbind(-1), theirs.unbind(-1), strict=True):
            squared += field.wrapped(a[:, :, None] - b[:, None]).square_()
    return squared.sqrt_()


def _beyond_tolerance(predicted: Tensor, target: Tensor, field: Field, schema: ElementSchema) -> Tensor:
    """Mark the pairs whose error of the field is not under its tolerance: bool `[images, set_size, target_size]`.

    An absent optional field of the real object asks for nothing.
    """
    mine, theirs = (schema.values(each.double(), field.name) for each in (predicted, target))
    error = field.wrapped(mine[:, :, None] - theirs[:, None]).square().sum(-1).sqrt()
    return ~(error < field.tolerance) & ~theirs.isnan().any(-1)[:, None]


def blocks(predicted: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split into blocks of images with at most `PAIRS_AT_ONCE` pairs of elements."""
    images = max(1, PAIRS_AT_ONCE // max(1, predicted.shape[1] * target.shape[1]))
    return zip(predicted.split(images), target.split(images), strict=True)


def _compare(predicted: Tensor, target: Tensor, schema: ElementSchema) -> tuple[Tensor, Tensor]:
    """Distance (float64) and whether it may be the object, both `[images, set_size, target_size]`.

    It may if the object is real, all classes are equal, and all fields with a tolerance are within it.
    """
    if target.shape[1] == 0:  # one absent object, so that there is a nearest
        target = target.new_zeros(len(target), 1, schema.set_dim)
    distance = pairwise_distance(predicted, target, schema=schema)
    mine, theirs = (elements.new_zeros(elements.shape[:2], dtype=torch.long) for elements in (predicted, target))
    for field in schema.categorical:  # all classes as one number
        mine = mine * field.size + schema.values(predicted, field.name)
        theirs = theirs * field.size + schema.values(target, field.name)
    candidate = presence_mask(target)[:, None] & (mine[:, :, None] == theirs[:, None])
    for name in schema.tolerances:
        candidate &= ~_beyond_tolerance(predicted, target, schema.field(name), schema)
    return distance, candidate


def _nearest(distance: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest candidate along the last axis, the first of equals; inf without any."""
    nearest = torch.where(candidate, distance, math.inf).min(-1)
    return nearest.values, nearest.indices


def _claim_in_turn(predicted: Tensor, target: Tensor, schema: ElementSchema) -> Tensor:
    """Distance `[images, set_size]` of each prediction, most confident first, to the object it claims; inf for none."""
    order = predicted[..., -1].argsort(dim=1, descending=True, stable=True)[..., None]
    distance, candidate = (each.gather(1, order.expand_as(each)) for each in _compare(predicted, target, schema))
    free = candidate.new_ones(len(candidate), candidate.shape[-1])
    claimed = torch.full_like(distance[..., 0], math.inf)
    for turn in range(distance.shape[1]):
        claimed[:, turn], index = _nearest(distance[:, turn], candidate[:, turn] & free)
        index, taken = index[:, None], claimed[:, turn, None].isfinite()
        free.scatter_(1, index, free.gather(1, index) & ~taken)
    return claimed


def check_scorable(predicted: Tensor, target: Tensor, schema: ElementSchema, thresholds: Sequence[float] = ()) -> None:
    """Raise `ValueError` for sets of other shapes or images, NaN where it counts, or thresholds not over 0."""
    for threshold in thresholds:
        if not threshold > 0:
            raise ValueError(f"expected thresholds over 0 (math.inf for none), got {threshold}")
    for name, elements in (("predicted", predicted), ("target", target)):
        if elements.ndim != 3 or elements.shape[-1] != schema.set_dim or not elements.is_floating_point():
            shape = f"[images, set_size, {schema.set_dim}]"
            raise ValueError(f"expected floating point {name} {shape}, got {elements.dtype} {list(elements.shape)}")
    if len(predicted) != len(target):
        raise ValueError(f"expected as many predicted sets as targets, got {len(predicted)} and {len(target)}")
    if predicted.sum().isfinite() and target.sum().isfinite():
        return  # then every number is finite; other sums need a closer look
    bad = predicted.isnan().flatten(1).any(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise InputError(f"expected predictions without NaN, got NaN in {int(bad.sum())} images, first image {first}")
    bad = target[..., -1].isnan().any(1) | (presence_mask(target) & ~target.isfinite().all(-1)).any(1)
    if bad.any():
        raise InputError(
            f"expected targets with finite real objects, got others, first in image {int(bad.nonzero()[0])}"
        )


class GatheredSets(Metric):
    """Base class of metrics of all sets together: `update(predicted, target)` keeps the sets.

    The result is the same for every batch size. A subclass implements `compute`, which calls `sets`.

    Args:
        schema: of the elements; None takes that of the task, from `use_schema`.
    """

    full_state_update = False
    is_differentiable = False
    mode, higher_is_better = "max", True

    def __init__(self, schema: ElementSchema | None) -> None:
        super().__init__()
        self.schema = schema
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def use_schema(self, schema: ElementSchema) -> None:
        """Take this schema unless one was given; raise `InputError` if that has other fields."""
        self.schema = self.schema or schema
        if self.schema.fields != schema.fields:  # perhaps of the same length, in other units
            raise InputError(
                f"metric {type(self).__name__} is of schema {self.schema.name!r}, the model of {schema.name!r}: "
                f"{schema.differences(self.schema)}; give the metric no schema"
            )

    def update(self, predicted: Tensor, target: Tensor) -> None:
        if self.schema is None:
            raise InputError(f"{type(self).__name__}: expected a schema, got none; pass schema")
        check_scorable(predicted, target, self.schema)
        self.predicted.append(predicted.detach())
        self.target.append(target.detach())

    def sets(self) -> tuple[Tensor, Tensor]:
        """All predicted and real sets so far."""
        return dim_zero_cat(self.predicted), dim_zero_cat(self.target)


class AveragePrecision(GatheredSets):
    """Average precision gathered over batches.

    `update(predicted, target)` keeps the sets, `compute()` gives {"ap_inf": ..., "ap_1": ..., ...} and their mean "ap"
    as float64 scalars. They equal the protocol on all images at once, for every batch size.

    Args:
        protocol: `average_precision` or `average_precision_per_image`.
        thresholds: those of the schema by default.
        schema: of the elements. A `setpred.training.SetPrediction` gives its own to a metric without one.

    Raises:
        InputError: sets without a schema.
    """

    monitor = "ap"

    def __init__(
        self,
        protocol: Callable[..., dict[float, float]] = average_precision,
        *,
        thresholds: Sequence[float] | None = None,
        schema: ElementSchema | None = None,
    ) -> None:
        super().__init__(schema)
        self.protocol, self.thresholds = protocol, None if thresholds is None else tuple(thresholds)

    def compute(self) -> dict[str, Tensor]:
        scores = self.protocol(*self.sets(), thresholds=self.thresholds, schema=self.schema)
        result = {f"ap_{threshold_name(t)}": torch.tensor(score, dtype=torch.float64) for t, score in scores.items()}
        return result | {"ap": torch.stack(list(result.values())).mean()}
