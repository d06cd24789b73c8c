"""CLEVR's world in figures: images with outlines, maps seen from above, and symbols of objects.

Symbols are to the scale of the map: shape, colour, size and material at a glance.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Polygon
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.rendering.scenes import HALF_SIZE
from setpred.schema import ElementSchema
from setpred.visualise.style import CLASS_COLOURS, FAINT, GROUND, INK, PLAIN, WRONG, Sheet

VIEW = (480, 320)  # pixels of CLEVR's images; other sizes show the same view stretched
REACH = 5.25  # half the side of the map; the corners of the placement square are at 4.24
_SQUARE = np.array([(-3, -3, 0), (3, -3, 0), (3, 3, 0), (-3, 3, 0)])
_TURN = np.linspace(0, 2 * np.pi, 49)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_ANNOTATION = {"textcoords": "offset points", "fontweight": "bold", "ha": "center", "va": "center", "zorder": 6}
_ANNOTATION |= {"annotation_clip": True}


def has_world(schema: ElementSchema) -> bool:
    """Whether figures can show elements in CLEVR's world."""
    return schema.has_world


def half_size(obj: Mapping[str, Any]) -> float:
    """Half the height of an object in world units; 0.5 without a CLEVR size."""
    return HALF_SIZE.get(obj.get("size"), 0.5)


def colour_of(obj: Mapping[str, Any]) -> str:
    """The colour of an object in figures."""
    return CLASS_COLOURS.get(obj.get("color"), PLAIN)


def cameras_of(locations: Any, count: int) -> list[Camera]:
    """One camera for each image; the nominal one where `locations` is None or NaN."""
    if locations is None:
        return [NOMINAL_CAMERA] * count
    rows = np.asarray(locations, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) < count:
        raise ValueError(f"expected camera [{count}, 3], got {list(rows.shape)}")
    return [Camera(tuple(row.tolist())) if np.isfinite(row).all() else NOMINAL_CAMERA for row in rows[:count]]


def as_pictures(images: Any) -> np.ndarray:
    """Convert uint8 images `[n, 3, H, W]` or `[n, H, W, 3]`, array or tensor, to arrays `[n, H, W, 3]`."""
    pictures = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pictures.ndim == 4 and pictures.shape[-1] != 3 and pictures.shape[1] == 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        shape = list(pictures.shape)
        raise ValueError(f"expected uint8 images [n, 3, H, W] or [n, H, W, 3], got {pictures.dtype} {shape}")
    return pictures


def on_map(coords: Any, camera: Camera) -> np.ndarray:
    """Map world points `[..., 3]` to `[..., 2]`, seen from above: to the right of and away from the camera."""
    x, y, _ = camera.axes()[0]
    return np.asarray(coords, dtype=np.float64)[..., :2] @ np.array([[x, -y], [y, x]])


def show_image(axes: Axes, picture: np.ndarray) -> None:
    """Show an image in its 3:2 shape."""
    axes.imshow(picture, extent=(0, VIEW[0], VIEW[1], 0), interpolation="bicubic", aspect="equal")
    axes.set(xlim=(0, VIEW[0]), ylim=(VIEW[1], 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def show_map(axes: Axes, camera: Camera, *, labelled: bool = True) -> None:
    """Draw an empty map: the camera at the lower edge, CLEVR's placement square and axes."""
    axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[], facecolor=GROUND)
    axes.spines[:].set(visible=True, color="#cfcfca")
    axes.add_patch(Polygon(on_map(_SQUARE, camera), facecolor="#f6f6f4", edgecolor="#bdbdb8", linewidth=0.8, zorder=0))
    if not labelled:
        return
    style = {"fontsize": 7.5, "color": "#666666", "ha": "center", "va": "center", "zorder": 1}
    origin = on_map((0.0, 0.0, 0.0), camera)
    for name, tip in (("x", (1.0, 0.0, 0.0)), ("y", (0.0, 1.0, 0.0))):
        end = on_map(tip, camera)
        axes.annotate("", end, origin, arrowprops={"arrowstyle": "->", "color": FAINT, "lw": 0.9}, zorder=1)
        axes.text(*(origin + 1.2 * (end - origin)), name, **style)
    axes.text(0, -REACH + 0.25, "▲ camera on this side", **style)
    axes.text(0, REACH - 0.25, "far side", **style)
    axes.plot((-REACH + 0.3, -REACH + 1.3), (-REACH + 0.55,) * 2, color=FAINT, linewidth=1.4, solid_capstyle="butt")
    axes.text(-REACH + 0.8, -REACH + 0.28, "1 unit", **style)


def badge(axes: Axes, at: Iterable[float], text: str, *, wrong: bool, lift: float = 0.0) -> None:
    """Write an object's number `lift` points above a position, white on red if it is wrong."""
    paper, ink = (WRONG, "white") if wrong else ("white", INK)
    box = {"boxstyle": "round,pad=0.18", "facecolor": paper, "edgecolor": INK, "linewidth": 0.6}
    axes.annotate(text, tuple(at), (0, lift), fontsize=7.5, color=ink, bbox=box, **_ANNOTATION)


def caption(axes: Axes, at: Iterable[float], text: str, *, drop: float = 0.0) -> None:
    """Write a red word `drop` points below a position of the map."""
    halo = [Stroke(linewidth=2, foreground="white"), Normal()]
    axes.annotate(text, tuple(at), (0, -drop), fontsize=8, color=WRONG, path_effects=halo, **_ANNOTATION)


class Legend:
    """A legend at the lower edge of a sheet, at the scale of its maps, whose side is `map_side` inches."""

    def __init__(self, sheet: Sheet, height: float, map_side: float) -> None:
        self.height, self.scale = height, 2 * REACH / map_side  # world units in an inch
        self.axes = sheet.panel(0, 0, sheet.width, height)
        self.axes.set(xlim=(0, sheet.width * self.scale), ylim=(0, height * self.scale))
        self.axes.set_axis_off()

    def at(self, right: float, down: float) -> tuple[float, float]:
        """World coordinates of a position in inches from the upper left corner."""
        return right * self.scale, (self.height - down) * self.scale

    def write(self, right: float, down: float, text: str) -> None:
        """Write text from a position in inches."""
        self.axes.text(*self.at(right, down), text, fontsize=9, va="center")


def _box() -> tuple[np.ndarray, list[np.ndarray]]:
    low, front, back = -0.88, 0.45, 0.88
    shift = back - front
    outline = [(low, low), (front, low), (back, low + shift), (back, back), (low + shift, back), (low, front)]
    edges = [(low, front), (front, front), (front, low)], [(front, front), (back, back)]
    return np.array(outline), [np.array(edge) for edge in edges]


def _can() -> tuple[np.ndarray, list[np.ndarray]]:
    lid = 0.28  # half the height of the lid, seen obliquely
    x, y = (_CIRCLE[:25] * (0.78, lid)).T
    top = 0.95 - lid
    upper, lower = np.stack([x, top + y], axis=1), np.stack([-x, -top - y], axis=1)
    return np.concatenate([upper, lower]), [np.stack([x, top - y], axis=1)]


# unit outline [k, 2] and inner lines; classes that are not CLEVR's look like spheres
_SYMBOLS = {"sphere": (0.95 * _CIRCLE, []), "cube": _box(), "cylinder": _can()}
_GLINTS = {"sphere": (-0.32, 0.36), "cube": (-0.42, -0.02), "cylinder": (-0.4, -0.05)}


def draw_filled(axes: Axes, obj: Mapping[str, Any], at: Any, *, opacity: float = 1.0, zorder: float = 4) -> None:
    """Draw the symbol of a predicted object, filled with its colour; metal has a glint."""
    at, half = np.asarray(at, dtype=np.float64), half_size(obj)
    shape = obj.get("shape") if obj.get("shape") in _SYMBOLS else "sphere"
    outline, lines = _SYMBOLS[shape]
    shared = {"alpha": opacity, "zorder": zorder, "clip_on": True}
    axes.add_patch(Polygon(at + half * outline, facecolor=colour_of(obj), edgecolor=INK, linewidth=0.9, **shared))
    for line in lines:
        axes.plot(*(at + half * line).T, color=INK, linewidth=0.7, solid_capstyle="butt", **shared)
    if obj.get("material") == "metal":
        centre = at + half * np.array(_GLINTS[shape])
        axes.add_patch(Ellipse(centre, 0.6 * half, 0.3 * half, angle=40, facecolor="white", linewidth=0, **shared))


def draw_outlined(axes: Axes, obj: Mapping[str, Any], at: Any, *, colour: str | None = None, zorder: float = 2) -> None:
    """Draw a thick outline of a real object, in its colour unless given, larger than a correct prediction."""
    outline = np.asarray(at) + 1.32 * half_size(obj) * _SYMBOLS.get(obj.get("shape"), _SYMBOLS["sphere"])[0]
    style = {"facecolor": "none", "joinstyle": "round", "zorder": zorder}
    for line, width in ((INK, 4.2), (colour or colour_of(obj), 2.8)):
        axes.add_patch(Polygon(outline, edgecolor=line, linewidth=width, **style))


def outline_on_image(axes: Axes, obj: Mapping[str, Any], camera: Camera, *, opacity: float = 1.0) -> np.ndarray | None:
    """Trace an object on its image; return its topmost pixel, None if that is out of sight."""
    lines = outlines_on_image(obj, camera)
    if not lines:
        return None
    for colour, width in (("white", 3.0), (colour_of(obj), 1.7)):
        for line in lines:
            axes.plot(*line.T, color=colour, linewidth=width, alpha=opacity, solid_joinstyle="round")
    points = np.concatenate(lines)
    top = points[points[:, 1].argmin()]
    return top if (top >= 0).all() and (top <= VIEW).all() else None


def outlines_on_image(obj: Mapping[str, Any], camera: Camera) -> list[np.ndarray]:
    """Closed lines `[k, 2]` in pixels of `VIEW` that trace a predicted object; none behind the camera.

    A sphere is its disc, a cylinder its silhouette and upper rim, anything else the visible faces of its box. Cubes
    follow the axes of the world: elements have no rotation.
    """
    centre, half = np.asarray(obj["coords"], dtype=np.float64), half_size(obj)
    if not np.isfinite(centre).all() or camera.project(centre, *VIEW)[2] < 1:
        return []
    right, up, _ = camera.axes()
    rim = np.insert(_CIRCLE, 2, 1.0, axis=1)
    if obj.get("shape") == "sphere":
        lines = [_CIRCLE[:, :1] * right + _CIRCLE[:, 1:] * up]
    elif obj.get("shape") == "cylinder":
        lines = [rim, rim * (1, 1, -1)]
    else:
        view = np.asarray(camera.location) - centre
        square = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)])
        seen = [axis for axis in range(3) if abs(view[axis]) > half]
        lines = [np.insert(square, axis, np.sign(view[axis]), axis=1) for axis in seen]
    pixels = [camera.project(centre + half * line, *VIEW)[..., :2] for line in lines]
    if obj.get("shape") == "cylinder":  # the convex hull of its rims: the farthest point in each direction
        points, turn = np.concatenate(pixels), np.linspace(0, 2 * np.pi, 361)
        farthest = (points @ np.stack([np.cos(turn), np.sin(turn)])).argmax(0)
        return [points[farthest], pixels[0]]
    return pixels
