"""Reliability diagram: the confidence of predictions against the share that is right."""

from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.errors import plural
from setpred.metrics import reliability, right_predictions
from setpred.metrics.calibration import BINS, FAINTEST
from setpred.schema import Calibration, ElementSchema
from setpred.visualise.style import FAINT, INK, PLAIN, WRONG, Sheet, styled

FEW = 10  # predictions in a bin whose share is mostly noise


@styled()
def draw_reliability(
    path: Path, predicted: Tensor, target: Tensor, *, calibration: Calibration, schema: ElementSchema, about: str
) -> Path:
    """Draw the share of right predictions in each bin of confidence, their number, and the diagonal of a perfect one.

    The expected calibration error is in the subtitle.
    """
    right, criterion = right_predictions(predicted, target, schema=schema)
    found = reliability(calibration.confidence(predicted[..., -1]), right.numpy())
    sheet = Sheet(7.4, 7.0)
    classes = ", with the right class" if schema.categorical else ""
    error = f"Expected calibration error (ECE): {100 * found['ece']:.1f} %." if found["bins"] else "No predictions."
    sheet.heading("Reliability of the confidence", f"{error} Right: {criterion}{classes}.", about)
    axes, counts = sheet.panel(0.85, 2.2, 6.2, 3.85), sheet.panel(0.85, 0.65, 6.2, 1.2)
    axes.plot([0, 100], [0, 100], "--", color=FAINT, linewidth=1.2, label="perfect: as many are right as it says")
    centres = [100 * (int(min(each["confidence"] * BINS, BINS - 1)) + 0.5) / BINS for each in found["bins"]]
    shares, means = ([100 * each[name] for each in found["bins"]] for name in ("right", "confidence"))
    width = 100 / BINS
    axes.bar(centres, shares, 0.92 * width, color=PLAIN, alpha=0.55, label="share that is right")
    for each, mean, share in zip(found["bins"], means, shares, strict=True):
        axes.plot([mean, mean], [share, mean], color=WRONG, linewidth=2, alpha=0.25 if each["count"] < FEW else 1.0)
    axes.plot([], [], color=WRONG, linewidth=2, label="difference from the mean confidence")
    axes.plot(means, shares, "o", color=INK, markersize=5, clip_on=False, label="bin at its mean confidence")
    axes.set(xlim=(0, 100), ylim=(0, 104), ylabel="share of the predictions that are right (%)")
    axes.grid()
    axes.legend(loc="upper left", fontsize=9)
    counts.bar(centres, [each["count"] for each in found["bins"]], 0.92 * width, color=PLAIN)
    for centre, each in zip(centres, found["bins"], strict=True):
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "textcoords": "offset points"}
        counts.annotate(f"{each['count']:,}", (centre, each["count"]), (0, 1), **style)
    counts.set(xlim=(0, 100), ylabel="number", xlabel="confidence (%)")
    counts.set_ylim(0, 1.25 * max([each["count"] for each in found["bins"]], default=1))
    note = f"{plural(found['predictions'], 'prediction')} with a confidence of at least {100 * FAINTEST:.0f} %"
    note += f"; faint lines: fewer than {FEW} predictions"
    axes.set_xticklabels([])
    axes.set_xticks(np.arange(0, 101, 20))
    counts.set_xticks(np.arange(0, 101, 20))
    sheet.note(0.85, 0.12, note, fontsize=8, color="#555555")
    return sheet.save(path)
