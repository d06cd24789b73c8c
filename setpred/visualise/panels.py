"""The panels that pictures of scenes are put together from: the image with outlines, and the map from above."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from matplotlib.patheffects import Normal, Stroke

from setpred.rendering.camera import Camera
from setpred.visualise.glyphs import colour_of
from setpred.visualise.style import FAINT, GROUND, INK, WRONG
from setpred.visualise.world import VIEW, on_map, outlines_on_image

REACH = 5.25  # half the side of the map: the placement square reaches 4.24 from its centre, and objects beyond it
_SQUARE = np.array([(-3, -3, 0), (3, -3, 0), (3, 3, 0), (-3, 3, 0)])


def show_image(axes: Axes, picture: np.ndarray) -> None:
    """An image in its true 3:2 shape, however it was squeezed."""
    axes.imshow(picture, extent=(0, VIEW[0], VIEW[1], 0), interpolation="bicubic", aspect="equal")
    axes.set(xlim=(0, VIEW[0]), ylim=(VIEW[1], 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def outline_on_image(axes: Axes, obj: Mapping[str, Any], camera: Camera, *, opacity: float = 1.0) -> np.ndarray | None:
    """Traces an object on its image; returns the pixel at the top of it, None when it is out of sight."""
    lines = outlines_on_image(obj, camera)
    if not lines:
        return None
    for colour, width in (("white", 3.0), (colour_of(obj), 1.7)):
        for line in lines:
            axes.plot(*line.T, color=colour, linewidth=width, alpha=opacity, solid_joinstyle="round")
    points = np.concatenate(lines)
    top = points[points[:, 1].argmin()]
    return top if (top >= 0).all() and (top <= VIEW).all() else None


def show_map(axes: Axes, camera: Camera, *, labelled: bool = True) -> None:
    """An empty map: seen from above, the camera at the lower edge, CLEVR's placement square and axes."""
    axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[], facecolor=GROUND)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#cfcfca")
    axes.add_patch(Polygon(on_map(_SQUARE, camera), facecolor="#f6f6f4", edgecolor="#bdbdb8", linewidth=0.8, zorder=0))
    if not labelled:
        return
    note = {"fontsize": 7.5, "color": "#666666", "ha": "center", "va": "center", "zorder": 1}
    origin = on_map((0.0, 0.0, 0.0), camera)
    for name, tip in (("x", (1.0, 0.0, 0.0)), ("y", (0.0, 1.0, 0.0))):
        end = on_map(tip, camera)
        axes.annotate("", end, origin, arrowprops={"arrowstyle": "->", "color": FAINT, "lw": 0.9}, zorder=1)
        axes.text(*(origin + 1.2 * (end - origin)), name, **note)
    axes.text(0, -REACH + 0.25, "▲ camera on this side", **note)
    axes.text(0, REACH - 0.25, "far side", **note)
    axes.plot((-REACH + 0.3, -REACH + 1.3), (-REACH + 0.55,) * 2, color=FAINT, linewidth=1.4, solid_capstyle="butt")
    axes.text(-REACH + 0.8, -REACH + 0.28, "1 unit", **note)


def badge(axes: Axes, at: Iterable[float], text: str, *, wrong: bool, lift: float = 0.0) -> None:
    """The number of an object, `lift` points above a spot; white on red where something is wrong."""
    paper, ink = (WRONG, "white") if wrong else ("white", INK)
    axes.annotate(
        text, tuple(at), (0, lift), textcoords="offset points", fontsize=7.5, fontweight="bold", color=ink,
        ha="center", va="center", zorder=6, annotation_clip=True,
        bbox={"boxstyle": "round,pad=0.18", "facecolor": paper, "edgecolor": INK, "linewidth": 0.6},
    )  # fmt: skip


def caption(axes: Axes, at: Iterable[float], text: str, *, drop: float) -> None:
    """A red word `drop` points under a spot of the map."""
    axes.annotate(
        text, tuple(at), (0, -drop), textcoords="offset points", fontsize=8, fontweight="bold", color=WRONG,
        ha="center", va="center", zorder=6, annotation_clip=True,
        path_effects=[Stroke(linewidth=2, foreground="white"), Normal()],
    )  # fmt: skip
