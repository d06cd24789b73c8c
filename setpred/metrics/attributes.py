"""Attribute report: the parts of an average precision, each scored separately."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from setpred.matching import hungarian
from setpred.metrics.average_precision import check_scorable, pairwise_distance, threshold_name
from setpred.schema import ElementSchema
from setpred.sets import presence_mask

_FAR = 100.0  # larger distances count as this, in thirds of the scale of the positions: CLEVR's units


def match_by_position(predicted: Tensor, target: Tensor, *, schema: ElementSchema) -> Tensor:
    """Match a predicted slot to each real object: one to one, by the least total distance, ignoring classes.

    Confident slots (presence over one half) come first; the others serve only where an image has too few of them.
    Otherwise an idle slot that happens to be near an object would take it. Returns long `[images, target_size]` for
    `attribute_report`: -1 for padding, and for real objects left over by a smaller predicted set.
    """
    check_scorable(predicted, target, schema)
    real = presence_mask(target)
    unit = max((field.scale for field in schema.position), default=3.0) / 3
    distance = pairwise_distance(predicted, torch.where(real[..., None], target, 0.0), schema=schema) / unit
    shy = _FAR * (target.shape[1] + 1)  # of a slot that claims no object: more than a set of far ones
    cost = distance.clamp(max=_FAR) + shy * ~presence_mask(predicted)[..., None]
    lacking = max(target.shape[1] - predicted.shape[1], 0)
    cost = torch.cat([cost, cost.new_full((len(cost), lacking, cost.shape[2]), 10 * shy)], 1)
    assignment = hungarian(torch.where(real[:, None], cost, 0.0))
    return torch.where(real & (assignment < predicted.shape[1]), assignment, -1)


def attribute_report(
    predicted: Tensor,
    target: Tensor,
    assignment: Tensor,
    *,
    thresholds: Sequence[float] | None = None,
    schema: ElementSchema,
) -> dict[str, Any]:
    """Score each attribute, the distance and the presence separately, to explain an average precision.

    Args:
        predicted, target: as in `average_precision`.
        assignment: long `[images, target_size]`, the slot matched to each real object, one to one, or -1 for none; not
            read for padding. `match_by_position` matches without the classes that are scored.

    Returns:
        Plain numbers, dictionaries and lists; NaN for an empty mean. "images", "objects". Over matched real objects:
        "accuracy" by categorical field, "all_attributes" (all right), "confusion" by field (counts, rows the real
        class), "distance" (L2 over the schema's `position`: mean, median, p90, p99), its "unit", "within" (share
        strictly under each threshold), "axis_errors" by continuous field (per axis: mean and median of the absolute
        error, bias = mean of the signed one), "errors" by continuous field besides the `position` (unit, and L2 error:
        mean, median, p90, over so many objects; of an optional field also "found", the share of the real ones that are
        predicted, and "invented", the share predicted where the object has none). Over all slots: "presence_accuracy"
        (confident exactly if matched). Over real objects: "found" (share whose match is confident). Over images:
        "count_error" (mean of |confident − real|), "count_exact" (share where it is 0).
    """
    thresholds = schema.thresholds if thresholds is None else thresholds
    check_scorable(predicted, target, schema)
    real = presence_mask(target)
    if assignment.shape != real.shape or assignment.dtype != torch.long:
        raise ValueError(
            f"expected long assignment {list(real.shape)}, got {assignment.dtype} {list(assignment.shape)}"
        )
    read = assignment[real]
    if len(read) and not -1 <= int(read.min()) <= int(read.max()) < predicted.shape[1]:
        raise ValueError(f"expected assigned slots in -1..{predicted.shape[1] - 1}, got {read.min()}..{read.max()}")
    image, slot = (real & (assignment >= 0)).nonzero(as_tuple=True)
    partner = assignment[image, slot]
    confident = presence_mask(predicted)
    matched = torch.zeros_like(confident)
    matched[image, partner] = True
    if int(matched.sum()) != len(partner):
        raise ValueError("expected a one-to-one assignment, got two real objects with the same predicted slot")

    truth, guess = target[image, slot].double(), predicted[image, partner].double()
    accuracy, confusion, axis_errors, errors = {}, {}, {}, {}
    all_right = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
    for field in schema.categorical:
        true_class, guessed = schema.values(truth, field.name), schema.values(guess, field.name)
        accuracy[field.name] = _mean(true_class == guessed)
        all_right &= true_class == guessed
        counts = torch.bincount(true_class * field.size + guessed, minlength=field.size**2)
        confusion[field.name] = counts.view(field.size, field.size).tolist()
    squared, unit = torch.zeros_like(truth[:, 0]), ""
    for field in schema.continuous:
        guessed, real_value = schema.values(guess, field.name), schema.values(truth, field.name)
        error = field.wrapped(guessed - real_value)
        if field in schema.position:
            squared += error.square().sum(-1)
            unit = field.unit
        known = error[~error.isnan().any(-1)]  # all but those of absent optional fields
        axis_errors[field.name] = [
            {"mean": _mean(axis.abs()), "median": _quantile(axis.abs(), 0.5), "bias": _mean(axis)} for axis in known.T
        ]
        if field in schema.position:
            continue
        length = known.square().sum(-1).sqrt()
        errors[field.name] = {"unit": field.unit, "objects": len(known), "mean": _mean(length)}
        errors[field.name] |= {name: _quantile(length, share) for name, share in (("median", 0.5), ("p90", 0.9))}
        if field.optional:
            there, found = ~real_value.isnan().any(-1), ~guessed.isnan().any(-1)
            errors[field.name] |= {"found": _mean(found[there]), "invented": _mean(found[~there])}
    distance = squared.sqrt()
    quantiles = {name: _quantile(distance, share) for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}
    miscount = (confident.sum(1) - real.sum(1)).abs()
    return {
        "images": len(real),
        "objects": len(read),
        "accuracy": accuracy,
        "all_attributes": _mean(all_right),
        "confusion": confusion,
        "distance": {"mean": _mean(distance)} | quantiles,
        "unit": unit,
        "within": {threshold_name(threshold): _mean(distance < threshold) for threshold in thresholds},
        "axis_errors": axis_errors,
        "errors": errors,
        "presence_accuracy": _mean(confident == matched),
        "found": int(confident[image, partner].sum()) / len(read) if len(read) else math.nan,
        "count_error": _mean(miscount),
        "count_exact": _mean(miscount == 0),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _quantile(values: Tensor, share: float) -> float:
    """Nearest-rank quantile; `torch.quantile` takes at most 16 million numbers."""
    return float(values.sort().values[math.ceil(share * len(values)) - 1]) if len(values) else math.nan
