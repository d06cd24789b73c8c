"""The world that CLEVR's images show: which schemas can be drawn in it, its views, its objects' outlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.rendering.scenes import HALF_SIZE
from setpred.schema import ElementSchema

VIEW = (480, 320)  # pixels of CLEVR's images; smaller ones show the same view, squeezed
_ROUND = np.linspace(0, 2 * np.pi, 49)


def has_world(schema: ElementSchema) -> bool:
    """Whether elements have a place in CLEVR's world: a continuous field "coords" of three numbers."""
    return any(field.name == "coords" and field.size == 3 for field in schema.continuous)


def half_size(obj: Mapping[str, Any]) -> float:
    """Half the height of an object in world units; 0.5 where the schema has no CLEVR size."""
    return HALF_SIZE.get(obj.get("size"), 0.5)


def cameras_of(locations: Any, count: int) -> list[Camera]:
    """A camera for each image: the known one, or the nominal one where the location is None or NaN."""
    if locations is None:
        return [NOMINAL_CAMERA] * count
    rows = np.asarray(locations, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) < count:
        raise ValueError(f"expected camera [{count}, 3], got {list(rows.shape)}")
    return [Camera(tuple(row.tolist())) if np.isfinite(row).all() else NOMINAL_CAMERA for row in rows[:count]]


def as_pictures(images: Any) -> np.ndarray:
    """uint8 `[n, 3, H, W]` or `[n, H, W, 3]`, array or tensor, to uint8 arrays `[n, H, W, 3]`."""
    pictures = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pictures.ndim == 4 and pictures.shape[-1] != 3 and pictures.shape[1] == 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        shape = list(pictures.shape)
        raise ValueError(f"expected uint8 images [n, 3, H, W] or [n, H, W, 3], got {pictures.dtype} {shape}")
    return pictures


def on_map(coords: Any, camera: Camera) -> np.ndarray:
    """World points `[..., 3]` to the map `[..., 2]`: to the right of and away from the camera, seen from above."""
    right = camera.axes()[0, :2]
    behind = np.array([-right[1], right[0]])
    return np.asarray(coords, dtype=np.float64)[..., :2] @ np.stack([right, behind]).T


def outlines_on_image(obj: Mapping[str, Any], camera: Camera) -> list[np.ndarray]:
    """Closed lines `[k, 2]` in pixels of `VIEW` that trace a predicted object; none if it lies behind the camera.

    A sphere is its disc, a cylinder its silhouette and its upper rim, and anything else its box's faces towards the
    camera. Cubes are drawn along the world's axes: elements do not say how they are turned.
    """
    centre, half = np.asarray(obj["coords"], dtype=np.float64), half_size(obj)
    if not np.isfinite(centre).all() or camera.project(centre, *VIEW)[2] < 1:
        return []
    right, up, _ = camera.axes()
    flat = np.stack([np.cos(_ROUND), np.sin(_ROUND), np.ones_like(_ROUND)], axis=1)
    if obj.get("shape") == "sphere":
        lines = [flat[:, :1] * right + flat[:, 1:2] * up]
    elif obj.get("shape") == "cylinder":
        lines = [flat, flat * (1, 1, -1)]
    else:
        lines = _faces_towards(np.asarray(camera.location) - centre, half)
    pixels = [camera.project(centre + half * line, *VIEW)[..., :2] for line in lines]
    return [_hull(np.concatenate(pixels)), pixels[0]] if obj.get("shape") == "cylinder" else pixels


def _faces_towards(view: np.ndarray, half: float) -> list[np.ndarray]:
    """The faces, as closed lines `[5, 3]`, of the unit box that are seen from `view` on a box of that half size."""
    square = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)])
    seen = [axis for axis in range(3) if abs(view[axis]) > half]
    return [np.insert(square, axis, np.sign(view[axis]), axis=1) for axis in seen]


def _hull(points: np.ndarray) -> np.ndarray:
    """Convex hull `[k, 2]` of points `[n, 2]`, closed: the lower chain, then the upper one."""
    points = points[np.lexsort((points[:, 1], points[:, 0]))]

    def chain(ordered: np.ndarray) -> list[np.ndarray]:
        kept: list[np.ndarray] = []
        for p in ordered:
            while len(kept) > 1 and _turn(kept[-2], kept[-1], p) <= 0:
                kept.pop()
            kept.append(p)
        return kept

    return np.array(chain(points)[:-1] + chain(points[::-1]))


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return (b[0] - a[0]) * (c[1] - b[1]) - (b[1] - a[1]) * (c[0] - b[0])
