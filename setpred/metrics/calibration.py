"""Calibration: fit confidences to the share of predictions that are right, and measure how far they are off."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpred.metrics.average_precision import GatheredSets, true_positives
from setpred.metrics.box_precision import match_boxes
from setpred.schema import Calibration, ElementSchema

FAINTEST = 0.05  # confidence under which predictions are not counted: empty slots would hide the error of the others
BINS = 10
LEAST_SLOPE = 0.05  # so that the confidence rises with the presence, whatever the data
STEPS = 200  # of the fit at most; it needs about ten


def right_predictions(predicted: Tensor, target: Tensor, *, schema: ElementSchema) -> tuple[Tensor, str]:
    """Find the predictions that are right: those of objects that no more confident prediction has claimed.

    For boxes, right is an intersection over union of at least 0.5 with a box of the class, as in
    `box_average_precision`. For others it is a distance under the schema's largest finite threshold with all classes
    right, as in `average_precision`.

    Returns:
        bool `[images, set_size]`, and the criterion in words.
    """
    if schema.has_boxes:
        return match_boxes(predicted, target, schema=schema)[0][..., 0], "IoU of at least 0.5"
    threshold = next(threshold for threshold in schema.thresholds if math.isfinite(threshold))
    asked = [f"distance under {threshold:g}", *(f"{name} under {most:g}" for name, most in schema.tolerances.items())]
    return true_positives(predicted, target, threshold, schema=schema), ", ".join(asked)


def fit_calibration(presence: Tensor, right: Tensor) -> Calibration:
    """Fit the confidence to the share that is right: Platt's method.

    Maximises Σ t log c + (1 - t) log(1 - c) with c = σ(slope (presence - ½) + offset) by Levenberg's
    damped Newton steps. The labels t
    are (n₊ + 1) / (n₊ + 2) for the n₊ right predictions and 1 / (n₋ + 2) for the others, so that separable predictions
    do not get infinite parameters. The slope is at least 0.05. The order of the predictions does not matter.

    Args:
        presence, right: of any shape, equal. Without predictions the result is `Calibration()`.

    Source: Platt, 1999; Lin, Lin, Weng, Machine Learning 2007.
    """
    x, right = (each.detach().cpu().flatten().numpy() for each in (presence.double(), right))
    if not len(x):
        return Calibration()
    order = np.lexsort((right, x))
    x, right = np.clip(x[order] - 0.5, -1e4, 1e4), right[order]
    count = int(right.sum())
    label = np.where(right, (count + 1) / (count + 2), 1 / (len(x) - count + 2))

    def loss(theta: np.ndarray) -> float:
        score = theta[0] * x + theta[1]
        return float((np.logaddexp(0, score) - label * score).sum())

    theta, damping = np.array([1.0, 0.0]), 1e-3 * len(x)
    now = loss(theta)
    for _ in range(STEPS):
        confidence = Calibration(*theta).confidence(x + 0.5)
        error, weight = confidence - label, confidence * (1 - confidence)
        gradient = np.array([(error * x).sum(), error.sum()])
        curvature = np.array([[(weight * x * x).sum(), (weight * x).sum()], [(weight * x).sum(), weight.sum()]])
        if theta[0] <= LEAST_SLOPE and gradient[0] > 0:  # held there
            gradient[0] = curvature[0, 1] = curvature[1, 0] = 0.0
        moved = theta - np.linalg.solve(curvature + damping * np.eye(2), gradient)
        moved[0] = max(moved[0], LEAST_SLOPE)
        gain = now - loss(moved)
        if gain > 0:
            theta, now, damping = moved, now - gain, 0.1 * damping
        else:
            damping *= 10
        if (0 < gain < 1e-12 * now) or damping > 1e9 * len(x):
            break
    return Calibration(*map(float, theta))


class CalibrationFit(GatheredSets):
    """Slope and offset of `fit_calibration`, gathered over batches; see `right_predictions`.

    `update(predicted, target)` keeps the sets, `compute()` gives "slope" and "offset" as float64 scalars.
    """

    monitor = "slope"

    def compute(self) -> dict[str, Tensor]:
        predicted, target = self.sets()
        right, _ = right_predictions(predicted, target, schema=self.schema)
        fitted = fit_calibration(predicted[..., -1], right).to_dict()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in fitted.items()}


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Compare confidences with the share that is right, in ten bins of equal width.

        ECE = Σ_bins n_bin / n |mean confidence - share right|

    Predictions of a confidence under 0.05 are left out.

    Args:
        confidence, right: of any shape, equal.

    Returns:
        Plain types: "ece", the expected calibration error (NaN without predictions), "predictions", and "bins" with
        "count", "confidence" and "right" of each bin that has any.

    Source: Naeini, Cooper, Hauskrecht, AAAI 2015.
    """
    kept = confidence >= FAINTEST
    confidence, right = confidence[kept], right[kept]
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        {"count": int(mine.sum()), "confidence": float(confidence[mine].mean()), "right": float(right[mine].mean())}
        for mine in (place == number for number in range(BINS))
        if mine.any()
    ]
    total = sum(each["count"] for each in bins)
    error = sum(each["count"] * abs(each["confidence"] - each["right"]) for each in bins)
    return {"ece": error / total if total else math.nan, "predictions": total, "bins": bins}
