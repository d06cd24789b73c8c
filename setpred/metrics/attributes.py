"""What lies behind an average precision: attributes, distance and presence apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from setpred.matching import hungarian
from setpred.metrics.average_precision import THRESHOLDS, check_pair, pairwise_distance, threshold_name
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import presence_mask

_FAR = 100.0  # a distance that counts no further
_SHY = 1e3  # what it costs to use a slot that claims no object: more than a whole set of far ones


def match_by_position(predicted: Tensor, target: Tensor, *, schema: ElementSchema = CLEVR) -> Tensor:
    """Which predicted slot stands for each real object: one to one, least total distance, classes ignored.

    Confident slots (presence over one half) come first; the others fill in only where an image has fewer confident
    slots than real objects. Otherwise an idle slot that happens to rest near an object would take it.

    Returns:
        long `[images, target_size]` for `attribute_report`: -1 for padding, and for the real objects that are left
        over when a predicted set is smaller than the real one.
    """
    check_pair(predicted, target, schema)
    real = presence_mask(target)
    target = torch.where(real[..., None], target, 0.0)
    cost = pairwise_distance(predicted, target, schema=schema).clamp(max=_FAR)
    cost = cost + _SHY * ~presence_mask(predicted)[..., None]
    lacking = max(target.shape[1] - predicted.shape[1], 0)
    cost = torch.cat([cost, cost.new_full((len(cost), lacking, cost.shape[2]), 10 * _SHY)], 1)
    assignment = hungarian(torch.where(real[:, None], cost, 0.0))
    return torch.where(real & (assignment < predicted.shape[1]), assignment, -1)


def attribute_report(
    predicted: Tensor,
    target: Tensor,
    assignment: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    schema: ElementSchema = CLEVR,
) -> dict[str, Any]:
    """What an AP near zero is made of: each attribute, the distance and the presence apart.

    Args:
        predicted, target: as in `average_precision`.
        assignment: long `[images, target_size]`, the predicted slot matched to each target slot, one to one, or -1
            for none; read only where the target is a real object. `match_by_position` gives one in which the
            classes do not choose the partners that they are judged against.

    Returns:
        Plain numbers, dictionaries and lists. "images", "objects"; over the matched real objects: "accuracy" by
        categorical field, "all_attributes" (all of them right at once), "confusion" by field (counts, rows the
        real class, columns the predicted one), "distance" (L2 over the continuous fields in their units: mean,
        median, p90, p99), "within" (share strictly under each threshold, classes ignored), "axis_errors" by
        continuous field (per axis: mean of the absolute error, median of it, and bias = mean of the signed one);
        over all slots: "presence_accuracy" (confident, over one half, exactly where matched to a real object);
        "found" (share of the real objects whose match is confident), "count_error" (mean of |confident − real|
        per image), "count_exact" (share of the images where it is 0). NaN where nothing is there to average.
    """
    check_pair(predicted, target, schema)
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
    accuracy, confusion, axis_errors = {}, {}, {}
    all_right = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
    for field in schema.categorical:
        true_class, guessed = schema.values(truth, field.name), schema.values(guess, field.name)
        accuracy[field.name] = _mean(true_class == guessed)
        all_right &= true_class == guessed
        counts = torch.bincount(true_class * field.size + guessed, minlength=field.size**2)
        confusion[field.name] = counts.view(field.size, field.size).tolist()
    squared = torch.zeros_like(truth[:, 0])
    for field in schema.continuous:
        error = schema.values(guess, field.name) - schema.values(truth, field.name)
        squared += error.square().sum(-1)
        axis_errors[field.name] = [
            {"mean": _mean(axis.abs()), "median": _quantile(axis.abs(), 0.5), "bias": _mean(axis)} for axis in error.T
        ]
    distance = squared.sqrt()
    miscount = (confident.sum(1) - real.sum(1)).abs()
    return {
        "images": len(real),
        "objects": len(read),
        "accuracy": accuracy,
        "all_attributes": _mean(all_right),
        "confusion": confusion,
        "distance": {"mean": _mean(distance)}
        | {name: _quantile(distance, q) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "within": {threshold_name(threshold): _mean(distance < threshold) for threshold in thresholds},
        "axis_errors": axis_errors,
        "presence_accuracy": _mean(confident == matched),
        "found": int(confident[image, partner].sum()) / len(read) if len(read) else math.nan,
        "count_error": _mean(miscount),
        "count_exact": _mean(miscount == 0),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _quantile(values: Tensor, share: float) -> float:
    """Nearest-rank quantile: `torch.quantile` refuses more than 16 million numbers."""
    return float(values.sort().values[math.ceil(share * len(values)) - 1]) if len(values) else math.nan
