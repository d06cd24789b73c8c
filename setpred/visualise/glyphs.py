"""Objects as little pictures, to scale, on a map or in a legend: shape, colour, size and material at a glance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Polygon

from setpred.visualise.style import CLASS_COLOURS, INK, PLAIN
from setpred.visualise.world import half_size

_ARC = np.linspace(0, np.pi, 25)
_LID = 0.28  # half height of a cylinder's lid, as seen obliquely


def _disc() -> tuple[np.ndarray, list[np.ndarray]]:
    full = np.linspace(0, 2 * np.pi, 49)
    return 0.95 * np.stack([np.cos(full), np.sin(full)], axis=1), []


def _box() -> tuple[np.ndarray, list[np.ndarray]]:
    low, front, back = -0.88, 0.45, 0.88
    shift = back - front
    outline = [(low, low), (front, low), (back, low + shift), (back, back), (low + shift, back), (low, front)]
    return np.array(outline), [
        np.array([(low, front), (front, front), (front, low)]),
        np.array([(front, front), (back, back)]),
    ]


def _can() -> tuple[np.ndarray, list[np.ndarray]]:
    x, y, top = 0.78 * np.cos(_ARC), _LID * np.sin(_ARC), 0.95 - _LID
    upper = np.stack([x, top + y], axis=1)
    lower = np.stack([-x, -top - y], axis=1)
    return np.concatenate([upper, lower]), [np.stack([x, top - y], axis=1)]


# unit outline [k, 2] and inner lines; a class that is not CLEVR's gets a disc
_PICTURES = {"sphere": _disc(), "cube": _box(), "cylinder": _can()}
_GLINTS = {"sphere": (-0.32, 0.36), "cube": (-0.42, -0.02), "cylinder": (-0.4, -0.05)}


def colour_of(obj: Mapping[str, Any]) -> str:
    return CLASS_COLOURS.get(obj.get("color"), PLAIN)


def _placed(obj: Mapping[str, Any], at: np.ndarray, grow: float) -> tuple[np.ndarray, list[np.ndarray]]:
    outline, lines = _PICTURES.get(obj.get("shape"), _PICTURES["sphere"])
    scale = half_size(obj) * grow
    return at + scale * outline, [at + scale * line for line in lines]


def draw_filled(axes: Axes, obj: Mapping[str, Any], at: Any, *, opacity: float = 1.0, zorder: float = 4) -> None:
    """A predicted object: filled with its colour; metal has a glint, rubber has none."""
    at = np.asarray(at, dtype=np.float64)
    outline, lines = _placed(obj, at, 1.0)
    shared = {"alpha": opacity, "zorder": zorder, "clip_on": True}
    axes.add_patch(Polygon(outline, facecolor=colour_of(obj), edgecolor=INK, linewidth=0.9, **shared))
    for line in lines:
        axes.plot(*line.T, color=INK, linewidth=0.7, solid_capstyle="butt", **shared)
    if obj.get("material") == "metal":
        half = half_size(obj)
        centre = at + half * np.array(_GLINTS.get(obj.get("shape"), _GLINTS["sphere"]))
        axes.add_patch(Ellipse(centre, 0.6 * half, 0.3 * half, angle=40, facecolor="white", linewidth=0, **shared))


def draw_outlined(axes: Axes, obj: Mapping[str, Any], at: Any, *, colour: str | None = None, zorder: float = 2) -> None:
    """A real object: a thick line, in its colour unless given, around the place where a right prediction would be.

    The line of a metal one shines at its upper left.
    """
    at = np.asarray(at, dtype=np.float64)
    outline, _ = _placed(obj, at, 1.32)
    for line, width in ((INK, 4.2), (colour_of(obj) if colour is None else colour, 2.8)):
        axes.add_patch(
            Polygon(outline, facecolor="none", edgecolor=line, linewidth=width, joinstyle="round", zorder=zorder)
        )
    if obj.get("material") == "metal":
        closed = np.concatenate([outline, outline[:1]])
        dense = np.concatenate([np.linspace(a, b, 20) for a, b in itertools.pairwise(closed)])
        angle = np.degrees(np.arctan2(*(dense - at).T[::-1]))
        shine = dense[(angle > 105) & (angle < 165)]
        axes.plot(*shine.T, color="white", linewidth=1.5, solid_capstyle="butt", zorder=zorder)
