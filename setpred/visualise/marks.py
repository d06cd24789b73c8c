"""Draw predicted and real objects on their images: points and boxes of any schema with positions in pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from setpred.schema import ElementSchema
from setpred.visualise.predictions import Comparison, compare
from setpred.visualise.style import INK, Sheet, plural, styled

REAL, FOUND, EXTRA = "#2fe05b", "#ffd23e", "#ff4b33"  # of the three kinds of marks; they differ in form, too
PANEL, GAP, COLUMNS = 2.6, 0.25, 4  # inches
ALONE = 4.8  # inches, of a single image
EDGE = [withStroke(linewidth=2.6, foreground="#111111")]  # so that marks are seen on every colour
BELOW = 0.42  # for the two lines under an image


@styled()
def draw_marks(
    path: Path,
    images: np.ndarray,
    predicted: Tensor,
    target: Tensor | None,
    *,
    schema: ElementSchema,
    about: str = "",
    shown: int = 12,
) -> Path:
    """Draw the images with the worst predictions: rings or boxes where objects are, crosses or boxes where predicted.

    A line leads from each prediction to its object. Images are ordered by missed and extra objects and wrong classes,
    then by distance. Without targets, class names are written at the predictions.

    Args:
        images: uint8 `[n, S, S, 3]`.
        predicted, target: `[n, set_size, set_dim]` of the same images; without a target the predictions alone.
        schema: a schema with a `side`.
    """
    known = target is not None
    target = torch.zeros_like(predicted) if target is None else target
    compared = [compare(*pair, schema) for pair in zip(predicted, target, strict=True)]
    worst = sorted(range(len(images)), key=lambda k: (_faults(compared[k]), _error(compared[k])), reverse=True)[:shown]
    columns = min(COLUMNS, len(worst))
    rows = -(-len(worst) // columns)
    top, panel = 0.95, PANEL if len(worst) > 1 else ALONE
    width = max(5.4, 2 * GAP + columns * panel + (columns - 1) * GAP)
    height = top + rows * (panel + BELOW) + 0.35
    sheet = Sheet(width, height)
    count = plural(len(images), "image")
    sheet.heading("Predictions on images", f"The worst {len(worst)} of {count}." if known else f"{count}.", about)
    for place, number in enumerate(worst):
        row, column = divmod(place, columns)
        left, bottom = GAP + column * (panel + GAP), height - top - panel - row * (panel + BELOW)
        axes = sheet.panel(left, bottom, panel, panel)
        _show(axes, images[number], compared[number], schema, known)
        text = _summary(compared[number]) if known else plural(len(compared[number].predicted), "object")
        axes.text(0, -0.03, text, transform=axes.transAxes, fontsize=8, va="top", color=INK)
    if known:
        handles = [
            Line2D([], [], marker="o", mfc="none", mec=REAL, ls="", label="real object"),
            Line2D([], [], marker="x", mec=FOUND, ls="", label="prediction with its object"),
            Line2D([], [], marker="x", mec=EXTRA, ls="", label="prediction without one, or of another class"),
        ]
        style = {"frameon": True, "facecolor": "#555555", "labelcolor": "white", "bbox_to_anchor": (0.01, 0.0)}
        sheet.legend(handles=handles, loc="lower left", ncols=3, fontsize=8, **style)
    return sheet.save(path)


def _show(axes: Axes, image: np.ndarray, compared: Comparison, schema: ElementSchema, known: bool) -> None:
    side = schema.side
    axes.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
    axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    for real in compared.real:
        _mark(axes, real, REAL, "o")
        _draw_keypoints(axes, real, REAL, "-", schema)
    for found, partner, wrong in zip(compared.predicted, compared.partner, compared.wrong, strict=True):
        colour = EXTRA if known and (partner is None or wrong) else FOUND
        if partner is not None:
            ends = zip(found["coords"], compared.real[partner]["coords"], strict=True)
            axes.plot(*(list(pair) for pair in ends), color=colour, lw=0.9, solid_capstyle="round")
        _mark(axes, found, colour, "x")
        _draw_keypoints(axes, found, colour, ":", schema)
        if not known and schema.categorical:
            text = " ".join(found[field.name] for field in schema.categorical)
            style = {"fontsize": 7.5, "color": colour, "path_effects": EDGE, "clip_on": True, "parse_math": False}
            axes.annotate(text, found["coords"], (5, 4), textcoords="offset points", **style)


def _mark(axes: Axes, obj: Mapping[str, Any], colour: str, marker: str) -> None:
    x, y = obj["coords"]
    if "extent" in obj:
        width, height = obj["extent"]
        style = "-" if marker == "o" else "--"
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=1.3, ls=style, path_effects=EDGE))
    else:
        size = 8 if marker == "o" else 5
        axes.plot([x], [y], marker, ms=size, mfc="none", mec=colour, mew=1.3, path_effects=EDGE)


def _draw_keypoints(axes: Axes, obj: Mapping[str, Any], colour: str, line: str, schema: ElementSchema) -> None:
    """Dots at the keypoints that the object has, and the lines of the skeleton between them."""
    places = {field.name: obj[field.name] for field in schema.keypoints if obj[field.name] is not None}
    for start, end in schema.skeleton:
        if start in places and end in places:
            axes.plot(*zip(places[start], places[end], strict=True), line, color=colour, lw=1.2, path_effects=EDGE)
    if places:
        axes.plot(*zip(*places.values(), strict=True), "o", ms=3.2, mfc=colour, mec="#111111", mew=0.6)


def _faults(compared: Comparison) -> int:
    return len(compared.missed) + compared.partner.count(None) + sum(map(bool, compared.wrong))


def _error(compared: Comparison) -> float:
    return max((distance for distance in compared.distance if distance is not None), default=0.0)


def _summary(compared: Comparison) -> str:
    found = [distance for distance in compared.distance if distance is not None]
    lines = [f"{len(found)} of {plural(len(compared.real), 'object')} found"]
    if found:
        lines[0] += f", {np.mean(found):.2g} away in the mean"
    faults: Sequence[str] = [
        f"{count} {name}"
        for count, name in (
            (len(compared.missed), "missed"),
            (compared.partner.count(None), "extra"),
            (sum(map(bool, compared.wrong)), "of another class"),
        )
        if count
    ]
    return "\n".join([*lines, ", ".join(faults)])
