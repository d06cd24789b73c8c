"""Precision-recall curves, one for each distance threshold."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from setpred.errors import plural
from setpred.metrics import average_precision, precision_recall, threshold_name
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import Sheet, styled

MOST_POINTS = 2_000  # of a curve, more than can be distinguished
_DASHES = ("-", "--", "-.", ":")
_EXPLANATION = """\
A prediction is right if all its classes
equal those of the nearest such object
of its image, the distance is below the
threshold, and no more confident one
has taken that object.

AP: average precision, the area
under the curve."""


@styled()
def draw_precision_recall(
    path: Path, predicted: Tensor, target: Tensor, *, thresholds: Sequence[float], schema: ElementSchema, about: str
) -> Path:
    """Draw the curves whose areas are the average precisions over the data set, with these areas in the legend."""
    scores = average_precision(predicted, target, thresholds=thresholds, schema=schema)
    sheet = Sheet(9.2, 5.9)
    objects = plural(int(presence_mask(target).sum()), "real object")
    subtitle = f"Predictions of {plural(len(target), 'image')} in one list, most confident first; {objects} to find."
    sheet.heading("Precision and recall", subtitle, about)
    axes = sheet.panel(0.83, 0.68, 4.78, 4.25)
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(thresholds), 1)))
    for number, threshold in enumerate(thresholds):
        score = scores[threshold]
        limit = "any distance" if math.isinf(threshold) else f"below {threshold_name(threshold)}"
        name = f"{limit}: AP " + ("undefined" if math.isnan(score) else f"{100 * score:.1f} %")
        recall, height = _envelope(predicted, target, threshold, schema)
        dashes = _DASHES[number % len(_DASHES)]
        axes.plot(100 * recall, 100 * height, dashes, color=shades[number], linewidth=1.9, label=name)
    axes.set(xlim=(0, 101), ylim=(0, 103), xlabel="recall: share of the real objects found so far (%)")
    axes.set_ylabel("precision: share of the predictions so far that are right (%)")
    axes.grid()
    title = {"title": "distance to the real object (units)", "alignment": "left", "handlelength": 3}
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), **title)
    axes.text(1.05, 0, _EXPLANATION, transform=axes.transAxes, fontsize=9, color="#555555", linespacing=1.4)
    return sheet.save(path)


def _envelope(
    predicted: Tensor, target: Tensor, threshold: float, schema: ElementSchema
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the staircase: at each recall the best precision there or further right, down to 0 at its end."""
    recall, precision = (
        values.cpu().numpy() for values in precision_recall(predicted, target, threshold, schema=schema)
    )
    step = np.flatnonzero(np.diff(recall, prepend=0.0))  # the true positives
    if not len(step) or not np.isfinite(recall).all():
        return np.zeros(1), np.zeros(1)
    height = np.maximum.accumulate(precision[::-1])[::-1]
    if len(step) > MOST_POINTS:
        step = step[np.unique(np.linspace(0, len(step) - 1, MOST_POINTS).astype(int))]
    right = recall[step]
    left = np.concatenate([[0.0], right[:-1]])
    corners = np.stack([left, right], 1).ravel(), np.repeat(height[step], 2)
    return np.append(corners[0], right[-1]), np.append(corners[1], 0.0)
