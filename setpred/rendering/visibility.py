"""Which object is seen where: rays through a grid of image points, the nearest hit of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from setpred.rendering.bodies import SHAPES, Bodies
from setpred.rendering.camera import ASPECT, FOCAL, Camera
from setpred.rendering.ground import floor_height
from setpred.rendering.shapes import HIT

GROUND = -1
CORNERS = np.array([(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T


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
    bodies: Bodies, camera: Camera, width: int, height: int, *, samples: int, aspect: float = ASPECT
) -> Visibility:
    """Casts the rays of an image at the objects, each object only inside its projected bounding box."""
    inside = ((np.arange(samples) + 0.5) / samples)[:, None]
    x = ((np.arange(width) + inside) / width - 0.5) / FOCAL
    y = (0.5 - (np.arange(height) + inside) / height) / (FOCAL * aspect)
    x = np.tile(x, (samples, 1)).astype(np.float32)
    y = np.repeat(y, samples, axis=0).astype(np.float32)
    ids = np.full((samples**2, height, width), GROUND, dtype=np.int8)
    depth = np.full((samples**2, height, width), np.inf, dtype=np.float32)
    axes = camera.axes().astype(np.float32)
    location = np.array(camera.location, dtype=np.float32)
    boxes = _boxes(bodies, camera, width, height, aspect)
    foot = floor_height(bodies.centre) / bodies.half - 1  # objects stand on z = 0, sunk into the floor by its height
    for index, (left, top, end, bottom) in enumerate(boxes):
        if left >= end or top >= bottom:
            continue
        origin = bodies.to_unit(index, location - bodies.centre[:, index])[:, None]
        right, up, backward = bodies.to_unit(index, axes.T).T[:, :, None, None, None]
        rows, columns = y[:, top:bottom, None], x[:, None, left:end]
        direction = right * columns + (up * rows - backward)
        hit = HIT[SHAPES[bodies.shape[index]]](origin, direction.reshape(3, -1)).reshape(direction.shape[1:])
        window = np.s_[:, top:bottom, left:end]
        nearer = (hit < depth[window]) & (origin[2] + hit * direction[2] > foot[index])
        np.copyto(depth[window], hit, where=nearer)
        np.copyto(ids[window], index, where=nearer)
    return Visibility(ids, depth, x, y, boxes)


def _boxes(bodies: Bodies, camera: Camera, width: int, height: int, aspect: float) -> np.ndarray:
    x, y, z = CORNERS[:, :, None] * bodies.half
    c, s = bodies.cosine, bodies.sine
    corners = np.stack([c * x - s * y, s * x + c * y, z]) + bodies.centre[:, None]
    return pixel_boxes(corners, camera, width, height, aspect)


def pixel_boxes(points: np.ndarray, camera: Camera, width: int, height: int, aspect: float) -> np.ndarray:
    """The pixels (left, top, right, bottom) around the convex hulls of points `[3, points, n]`: int `[n, 4]`."""
    seen = camera.project(np.moveaxis(points, 0, -1), width, height, aspect=aspect)
    limit = np.array([width, height])
    low = np.clip(np.floor(seen[..., :2].min(axis=0)), 0, limit)
    high = np.clip(np.ceil(seen[..., :2].max(axis=0)), 0, limit)
    behind = seen[..., 2].min(axis=0)[:, None] < 0.1  # such hulls have no finite box
    return np.concatenate([np.where(behind, 0, low), np.where(behind, limit, high)], axis=1).astype(int)
