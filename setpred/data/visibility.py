"""Which object is seen where: rays through a grid of image points, nearest hit of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from setpred.data.camera import ASPECT, FOCAL, Camera
from setpred.data.shapes import HIT

if TYPE_CHECKING:
    from setpred.data.scenes import SceneObject

HALF_SIZE = {"large": 0.7, "small": 0.35}
GROUND = -1
CORNERS = np.array([(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def turn(angle: float) -> np.ndarray:
    """The matrix `[3, 3]` that turns by `angle` radians about z."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@dataclass(frozen=True)
class Visibility:
    """Nearest objects on a grid of `samples` x `samples` rays in every pixel.

    ids: int8 `[samples^2, height, width]`, index of the object or -1 for the ground.
    depth: float32 `[samples^2, height, width]`, depth of the object's surface, inf on the ground.
    x, y: float32 `[samples^2, width]` and `[samples^2, height]`; the ray is x right + y up - backward.
    boxes: int `[objects, 4]`, the pixels (left, top, right, bottom) that may show each object.
    """

    ids: np.ndarray
    depth: np.ndarray
    x: np.ndarray
    y: np.ndarray
    boxes: np.ndarray


def find_visible(
    objects: Sequence[SceneObject], camera: Camera, width: int, height: int, *, samples: int, aspect: float = ASPECT
) -> Visibility:
    """Casts the rays of an image at the objects, each only inside its projected bounding box."""
    inside = (np.arange(samples) + 0.5) / samples
    x = ((np.arange(width) + inside[:, None]) / width - 0.5) / FOCAL
    y = (0.5 - (np.arange(height) + inside[:, None]) / height) / (FOCAL * aspect)
    x = np.tile(x, (samples, 1)).astype(np.float32)
    y = np.repeat(y, samples, axis=0).astype(np.float32)
    ids = np.full((samples**2, height, width), GROUND, dtype=np.int8)
    depth = np.full((samples**2, height, width), np.inf, dtype=np.float32)
    turns = [turn(obj.rotation) for obj in objects]
    boxes = _boxes(objects, turns, camera, width, height, aspect)
    axes = camera.axes()
    for index, (obj, matrix, (left, top, right, bottom)) in enumerate(zip(objects, turns, boxes, strict=True)):
        if left >= right or top >= bottom:
            continue
        to_unit = matrix.T / HALF_SIZE[obj.size]
        origin = (to_unit @ (np.subtract(camera.location, obj.coords))).astype(np.float32)
        along_x, along_y, back = (to_unit @ axes.T).T.astype(np.float32)
        rows, columns = y[:, top:bottom, None], x[:, None, left:right]
        direction = tuple(columns * along_x[k] + (rows * along_y[k] - back[k]) for k in range(3))
        hit = HIT[obj.shape](origin, direction)
        window = np.s_[:, top:bottom, left:right]
        nearer = hit < depth[window]
        np.copyto(depth[window], hit, where=nearer)
        np.copyto(ids[window], index, where=nearer)
    return Visibility(ids, depth, x, y, boxes)


def _boxes(
    objects: Sequence[SceneObject],
    turns: list[np.ndarray],
    camera: Camera,
    width: int,
    height: int,
    aspect: float,
) -> np.ndarray:
    corners = [np.asarray(o.coords) + HALF_SIZE[o.size] * CORNERS @ m.T for o, m in zip(objects, turns, strict=True)]
    seen = camera.project(np.array(corners).reshape(-1, 8, 3), width, height, aspect=aspect)
    low = np.floor(seen[..., :2].min(axis=1)).astype(int)
    high = np.ceil(seen[..., :2].max(axis=1)).astype(int)
    limit = [width, height]
    return np.concatenate([np.clip(low, 0, limit), np.clip(high, 0, limit)], axis=1)


def instance_map(
    objects: Sequence[SceneObject], camera: Camera, width: int, height: int, *, aspect: float = ASPECT
) -> np.ndarray:
    """Index of the object seen at each pixel centre, -1 for the ground: int8 `[height, width]`."""
    return find_visible(objects, camera, width, height, samples=1, aspect=aspect).ids[0]
