"""Precision against recall, one curve for each distance threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from setpred.metrics import average_precision, precision_recall, threshold_name
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import heading, new_figure, plural, save_png, styled

MOST_POINTS = 2_000  # drawn of a curve; more cannot be told apart
_DASHES = ("-", "--", "-.", ":")
_EXPLANATION = """\
A prediction is right if all its classes
equal those of the nearest such object
of its image, the distance is under the
threshold, and no more confident one
has taken that object.

AP: average precision, the area
under the curve."""


@styled()
def draw_precision_recall(
    path: Path, predicted: Tensor, target: Tensor, *, thresholds: Sequence[float], schema: ElementSchema, about: str
) -> Path:
    """The curves under which the average precision over the data set is the area, that area in the legend."""
    scores = average_precision(predicted, target, thresholds=thresholds, schema=schema)
    figure = new_figure(9.2, 5.9)
    objects = int(presence_mask(target).sum())
    heading(
        figure,
        "Precision and recall",
        f"Predictions of {plural(len(target), 'image')} in one list, most confident first; "
        f"{plural(objects, 'real object')} to find.",
        about,
    )
    axes = figure.add_axes((0.09, 0.115, 0.52, 0.72))
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(thresholds), 1)))
    for number, threshold in enumerate(thresholds):
        score = scores[threshold]
        limit = "any distance" if math.isinf(threshold) else f"under {threshold_name(threshold)}"
        name = f"{limit}: AP " + ("undefined" if math.isnan(score) else f"{100 * score:.1f} %")
        recall, height = _envelope(predicted, target, threshold, schema)
        dashes = _DASHES[number % len(_DASHES)]
        axes.plot(100 * recall, 100 * height, dashes, color=shades[number], linewidth=1.9, label=name)
    axes.set(xlim=(0, 101), ylim=(0, 103), xlabel="recall: share of the real objects found so far (%)")
    axes.set_ylabel("precision: share of the predictions so far that are right (%)")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        title="distance to the real object (units)",
        alignment="left",
        handlelength=3,
    )
    figure.text(0.635, 0.115, _EXPLANATION, fontsize=9, color="#555555", va="bottom", linespacing=1.4)
    return save_png(figure, path)


def _envelope(
    predicted: Tensor, target: Tensor, threshold: float, schema: ElementSchema
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the staircase: at each recall the best precision there or further right, down to 0 at its end."""
    recall, precision = (
        values.cpu().numpy() for values in precision_recall(predicted, target, threshold, schema=schema)
    )
    if not len(recall) or not np.isfinite(recall).all():
        return np.zeros(1), np.zeros(1)
    height = np.maximum.accumulate(precision[::-1])[::-1]
    step = np.flatnonzero(np.diff(recall, prepend=0.0))  # the true positives
    if len(step) > MOST_POINTS:
        step = step[np.unique(np.linspace(0, len(step) - 1, MOST_POINTS).astype(int))]
    right, height = recall[step], height[step]
    left = np.concatenate([[0.0], right[:-1]])[: len(right)]
    last = right[-1:] if len(right) else np.zeros(1)
    return np.append(np.stack([left, right], 1).ravel(), last), np.append(np.stack([height, height], 1).ravel(), 0.0)
