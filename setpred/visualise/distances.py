"""How far predictions lie from the objects they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.metrics import pairwise_distance, threshold_name
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import INK, PLAIN, heading, new_figure, plural, save_png, styled


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
    """Histogram of the distance on a logarithmic axis, with the share of the objects under each threshold."""
    image, slot = (presence_mask(target) & (assignment >= 0)).nonzero(as_tuple=True)
    distance = pairwise_distance(predicted, target, schema=schema)[image, assignment[image, slot], slot].cpu().numpy()
    figure = new_figure(9.2, 5.4)
    axes = figure.add_axes((0.08, 0.13, 0.89, 0.62))
    limits = sorted(threshold for threshold in thresholds if math.isfinite(threshold))
    middle = f"; median {np.median(distance):.3g}" if len(distance) else ""
    heading(
        figure,
        "How far predictions lie from the objects",
        f"{plural(len(distance), 'real object')} and the predictions that stand for them, paired one to one by place "
        f"alone{middle}.",
        about,
    )
    low = min([0.01, *(limit / 4 for limit in limits)])
    high = max([10.0, *(4 * limit for limit in limits)])
    edges = np.geomspace(low, high, 61)
    shares = np.histogram(np.clip(distance, low, high), edges)[0] / max(len(distance), 1)
    axes.bar(edges[:-1], 100 * shares, np.diff(edges), align="edge", color=PLAIN, edgecolor="white", linewidth=0.4)
    axes.set(xscale="log", xlim=(low, high), ylim=(0, max(100 * shares.max() * 1.08, 1)))
    axes.set_xlabel("distance between prediction and real object (units; the ends hold what lies beyond)")
    axes.set_ylabel("share of the real objects (%)")
    ticks = sorted({10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    above = {"fontsize": 9, "va": "bottom", "annotation_clip": False, "textcoords": "offset points"}
    axes.annotate("closer than\nshare", (0, 1), (0, 4), xycoords="axes fraction", ha="left", **above)
    for limit in limits:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
        share = f"{100 * np.mean(distance < limit):.1f} %" if len(distance) else "none"
        text = f"{threshold_name(limit)}\n{share}"
        axes.annotate(text, (limit, 1), (0, 4), xycoords=("data", "axes fraction"), ha="center", **above)
    return save_png(figure, path)
