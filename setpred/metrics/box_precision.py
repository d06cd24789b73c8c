"""Average precision and recall of predicted boxes by intersection over union, as COCO's evaluator computes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.metrics.average_precision import GatheredSets, blocks, check_scorable
from setpred.schema import ElementSchema
from setpred.sets import presence_mask

OVERLAPS = np.linspace(0.5, 0.95, 10)  # IoU thresholds
RECALLS = np.linspace(0.0, 1.0, 101)  # recalls at which COCO reads the precision
MOST_DETECTIONS = (1, 10, 100)  # of a class in an image, most confident first
NAMES = ("AP", "AP50", "AP75", *(f"AR{most}" for most in MOST_DETECTIONS))
EVERY = (0.0, np.inf)  # areas
AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # small, medium and large boxes
AREA_NAMES = {f"{score[:2]}{size}": (score, size) for score in ("AP", "AR100") for size in AREAS}


def box_average_precision(
    predicted: Tensor, target: Tensor, *, schema: ElementSchema, areas: bool = False
) -> dict[str, Any]:
    """AP and AR of boxes as of `pycocotools.COCOeval`, for boxes of every area and perhaps for three ranges of it.

    A box has its centre in `coords` and its sides in `extent`. Its class is that of `ElementSchema.label`; with several
    such fields, each combination is a class. In each image and class the 100 most confident predictions count. In the
    order of confidence, each takes the free real box of its class with the largest intersection over union, if that is
    at least the IoU threshold; of equal ones, the last. Predictions of all images are ranked by presence, equal ones by
    (image, slot). AP is the mean over 101 recalls of the largest precision at this recall or beyond. AR is the recall
    of all (1, 10 or 100) predictions of an image and class. Both are means over the thresholds 0.50, 0.55, ..., 0.95,
    and then over the classes that have real boxes.

    A range of areas leaves out real boxes outside of it, with the predictions that take one because no other is free,
    and predictions outside of it that take none.

    Args:
        predicted, target: as in `average_precision`. Negative sides count as 0.
        areas: also score small (up to 32²), medium and large (from 96²) boxes, in the squared unit of `extent`.

    Returns:
        Fractions "AP", "AP50", "AP75", "AR1", "AR10", "AR100" (NaN without real boxes), with `areas` "APs", "APm",
        "APl", "ARs", "ARm", "ARl", the number of real "boxes", and "classes": the same for each class with real boxes,
        by name.

    Raises:
        InputError: a schema without boxes.
        ValueError: wrong shapes, NaN in a prediction or in a real object.

    Source: Lin et al., ECCV 2014; the published evaluation code, which it equals on the same boxes.
    """
    found = {"": _scores(predicted, target, schema, EVERY)}
    found |= {size: _scores(predicted, target, schema, area) for size, area in AREAS.items() if areas}
    names = {name: (name, "") for name in NAMES} | (AREA_NAMES if areas else {})
    classes = {
        kind: {name: found[size].get(kind, {}).get(score, np.nan) for name, (score, size) in names.items()}
        | {"boxes": of["boxes"]}
        for kind, of in found[""].items()
    }

    def mean(score: str, size: str) -> float:
        return float(np.mean([of[score] for of in found[size].values()])) if found[size] else np.nan

    means = {name: mean(*of) for name, of in names.items()}
    return means | {"boxes": sum(of["boxes"] for of in classes.values()), "classes": classes}


def _scores(
    predicted: Tensor, target: Tensor, schema: ElementSchema, area: tuple[float, float]
) -> dict[str, dict[str, Any]]:
    """The scores `NAMES` and the number of real "boxes" of each class that has boxes of an area in this range."""
    hits, rank, kind, left_out = match_boxes(predicted, target, schema=schema, area=area)
    real_kind = _kinds(target, schema)[presence_mask(target) & ~_outside(target, schema, area)]
    order = predicted[..., -1].double().flatten().argsort(descending=True, stable=True)
    hits, rank, kind, left_out = (e.flatten(0, 1)[order].cpu().numpy() for e in (hits, rank, kind, left_out))
    classes = {}
    for number, boxes in zip(*np.unique(real_kind.cpu().numpy(), return_counts=True), strict=True):
        mine = (kind == number) & (rank < MOST_DETECTIONS[-1])
        precision = _precision_at_recalls(hits[mine], left_out[mine], boxes)
        scores = (precision.mean(), precision[0].mean(), precision[5].mean())
        recalls = (hits[mine & (rank < most)].sum(0).mean() / boxes for most in MOST_DETECTIONS)
        found = dict(zip(NAMES, map(float, (*scores, *recalls)), strict=True))
        classes[_class_name(int(number), schema)] = found | {"boxes": int(boxes)}
    return classes


def columns(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores of a table of `box_average_precision`: areas that no real box has are left out."""
    return [*NAMES, *(name for name in AREA_NAMES if not np.isnan(scores.get(name, np.nan)))]


def match_boxes(
    predicted: Tensor, target: Tensor, *, schema: ElementSchema, area: tuple[float, float] = EVERY
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match predicted to real boxes of their class at each of `OVERLAPS`, see `box_average_precision`.

    Args:
        area: range of areas that count.

    Returns:
        Whether each prediction has a real box, bool `[images, set_size, 10]`; its rank among the predictions of its
        class in its image, from 0, and its class as a number, both int64 `[images, set_size]`; and whether it is left
        out for an area, bool `[images, set_size, 10]`.
    """
    require_boxes(schema)
    check_scorable(predicted, target, schema)
    found = [_take_in_turn(*block, schema, area) for block in blocks(predicted, target)]
    hits, rank, kind, left_out = map(torch.cat, zip(*found, strict=True))
    return hits, rank, kind, left_out


def require_boxes(schema: ElementSchema) -> None:
    """Raise `InputError` for a schema without boxes."""
    if not schema.has_boxes:
        raise InputError(f"schema {schema.name!r}: expected boxes, two numbers of coords and of extent, got others")


def _take_in_turn(
    predicted: Tensor, target: Tensor, schema: ElementSchema, area: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`match_boxes` of some images."""
    kind, order = _kinds(predicted, schema), predicted[..., -1].argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    rank = ((place[:, None] < place[:, :, None]) & (kind[:, None] == kind[:, :, None])).sum(-1)
    hits = kind.new_zeros(*kind.shape, len(OVERLAPS), dtype=torch.bool)
    left_out = _outside(predicted, schema, area)[..., None].expand_as(hits).clone()
    if not target.shape[1]:
        return hits, rank, kind, left_out
    same = (kind[:, :, None] == _kinds(target, schema)[:, None]) & presence_mask(target)[:, None]
    overlap = torch.where(same, intersection_over_union(predicted, target, schema=schema), -1.0)
    least = torch.tensor(np.minimum(OVERLAPS, 1 - 1e-10), device=overlap.device)  # as COCO's
    images, number = torch.arange(len(target), device=order.device), torch.arange(target.shape[1], device=order.device)
    free, outside = same.new_ones(len(target), len(least), target.shape[1]), _outside(target, schema, area)[:, None]
    for slot in order.unbind(1):
        of_free = torch.where(free, overlap[images, slot][:, None], -1.0)
        inside = of_free.masked_fill(outside, -1.0)
        of_free = torch.where((inside.amax(-1) >= least)[..., None], inside, of_free)  # those that count come first
        best = of_free.amax(-1)
        taken = best >= least
        chosen = ((of_free == best[..., None]) * number).amax(-1, keepdim=True)  # the last of equals
        beyond = outside.expand_as(free).gather(2, chosen)[..., 0]
        hits[images, slot] = taken & ~beyond
        left_out[images, slot] = torch.where(taken, beyond, left_out[images, slot])
        free.scatter_(2, chosen, free.gather(2, chosen) & ~taken[..., None])
    return hits, rank, kind, left_out


def _outside(elements: Tensor, schema: ElementSchema, area: tuple[float, float]) -> Tensor:
    """Whether the area of a box is out of a range, bool `[images, set_size]`."""
    size = schema.values(elements.double(), "extent").clamp(min=0).prod(-1)
    return (size < area[0]) | (size > area[1])


def intersection_over_union(predicted: Tensor, target: Tensor, *, schema: ElementSchema) -> Tensor:
    """Compute |A ∩ B| / |A ∪ B| of boxes, float64 `[images, set_size, target_size]`; 0 where not finite."""
    corners, sizes, areas = [], [], []
    for elements in (predicted, target):
        centre, extent = (schema.values(elements.double(), name) for name in ("coords", "extent"))
        extent = extent.clamp(min=0)
        corners.append(centre - extent / 2)
        sizes.append(extent)
        areas.append(extent.prod(-1))
    (mine, theirs), (my_size, their_size) = corners, sizes
    ends = torch.minimum((mine + my_size)[:, :, None], (theirs + their_size)[:, None])
    shared = (ends - torch.maximum(mine[:, :, None], theirs[:, None])).clamp(min=0).prod(-1)
    union = areas[0][:, :, None] + areas[1][:, None] - shared
    return (shared / union).nan_to_num(0.0, 0.0, 0.0)


def _kinds(elements: Tensor, schema: ElementSchema) -> Tensor:
    """The class of each element as one number."""
    kind = elements.new_zeros(elements.shape[:2], dtype=torch.long)
    for field in schema.label:
        kind = kind * field.size + schema.values(elements, field.name)
    return kind


def _class_name(kind: int, schema: ElementSchema) -> str:
    names: list[str] = []
    for field in reversed(schema.label):
        kind, index = divmod(kind, field.size)
        names.insert(0, field.classes[index])
    return " ".join(names) or "object"


def _precision_at_recalls(hits: np.ndarray, left_out: np.ndarray, boxes: int) -> np.ndarray:
    """Precision `[10, 101]` at `RECALLS`, of ranked predictions `[n, 10]`: 0 beyond the last recall."""
    right, counted = (each.cumsum(0, dtype=np.float64).T for each in (hits, ~left_out))
    # COCO's numbers: precision has an epsilon, recall is looked up from the left
    precision = right / (counted + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(envelope, ((0, 0), (0, 1)))
    return np.stack([each[np.searchsorted(r, RECALLS)] for each, r in zip(padded, right / boxes, strict=True)])


class BoxAveragePrecision(GatheredSets):
    """AP and AR of boxes gathered over batches, see `box_average_precision`.

    `update(predicted, target)` keeps the sets, `compute()` gives "box_ap", "box_ap50", "box_ap75", "box_ar1",
    "box_ar10" and "box_ar100" as float64 scalars, for every batch size the same.

    Args:
        schema: see `GatheredSets`.
    """

    monitor = "box_ap"

    def __init__(self, *, schema: ElementSchema | None = None) -> None:
        super().__init__(schema)

    def use_schema(self, schema: ElementSchema) -> None:
        require_boxes(schema)
        super().use_schema(schema)

    def compute(self) -> dict[str, Tensor]:
        scores = box_average_precision(*self.sets(), schema=self.schema)
        return {f"box_{name.lower()}": torch.tensor(scores[name], dtype=torch.float64) for name in NAMES}
