"""Distances between predictions and their matched objects."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.errors import plural
from setpred.metrics import pairwise_distance, threshold_name
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import INK, PLAIN, Sheet, styled


@styled()
def draw_distance_errors(
    path: Path,
    predicted: Tensor,
    target: Tensor,
    assignment: Tensor,
    *,
    thresholds: Sequence[float],
    schema: ElementSchema,
    about: str,
) -> Path:
    """Draw a histogram of the distances on a logarithmic axis, and the share of the objects below each threshold."""
    image, slot = (presence_mask(target) & (assignment >= 0)).nonzero(as_tuple=True)
    distance = pairwise_distance(predicted, target, schema=schema)[image, assignment[image, slot], slot].cpu().numpy()
    limits = sorted(threshold for threshold in thresholds if math.isfinite(threshold))
    sheet = Sheet(9.2, 5.4)
    median = f"; median {np.median(distance):.3g}" if len(distance) else ""
    subtitle = f"{plural(len(distance), 'real object')}, matched one to one to predictions by position alone{median}."
    sheet.heading("Distance errors", subtitle, about)
    axes = sheet.panel(0.75, 0.7, 8.2, 3.35)
    low, high = (limits[0] / 6.25, 10 * limits[-1]) if limits else (0.01, 10.0)
    edges = np.geomspace(low, high, 61)
    shares = np.histogram(np.clip(distance, low, high), edges)[0] / max(len(distance), 1)
    axes.bar(edges[:-1], 100 * shares, np.diff(edges), align="edge", color=PLAIN, edgecolor="white", linewidth=0.4)
    axes.set(xscale="log", xlim=(low, high), ylim=(0, max(100 * shares.max() * 1.08, 1)))
    axes.set_xlabel("distance between prediction and real object (units; the end bins include all values beyond)")
    axes.set_ylabel("share of the real objects (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    above = {"fontsize": 9, "va": "bottom", "annotation_clip": False, "textcoords": "offset points"}
    axes.annotate("closer than\nshare", (0, 1), (0, 4), xycoords="axes fraction", ha="left", **above)
    for limit in limits:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
        share = f"{100 * np.mean(distance < limit):.1f} %" if len(distance) else "none"
        text = f"{threshold_name(limit)}\n{share}"
        axes.annotate(text, (limit, 1), (0, 4), xycoords=("data", "axes fraction"), ha="center", **above)
    return sheet.save(path)
