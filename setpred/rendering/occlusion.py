"""Whether every object of a scene shows enough of itself: CLEVR's rule against hidden objects, decided quickly.

A picture of all objects would tell, but costs more than the rest of the sampling. Nearly all objects are cleared by a
lower bound: each holds the sphere of its half size and lies in an upright cylinder, so what it shows is at least the
disc of its sphere less the cylinders of the others. For the few that are in doubt the pixels are counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from setpred.rendering.camera import ASPECT, FOCAL, Camera
from setpred.rendering.scenes import HALF_SIZE, SHAPES, SceneObject
from setpred.rendering.shapes import HITS

WIDTH, HEIGHT = 480, 320  # CLEVR's images, in which it counts
RADIUS = {"sphere": 1.0, "cube": 1.35, "cylinder": 1.0}  # of the upright cylinder around each shape of half size 1
POINTS = 32  # on each disc
CERTAIN = 1.25  # cleared by so many times the wanted pixels: the points give a disc's visible share only roughly
NEAR = 0.1  # nothing closer to the camera than this is seen
CORNERS = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(-1, 3)

_number = np.arange(POINTS) + 0.5
_turn = _number * math.pi * (3 - math.sqrt(5))
DISC = np.sqrt(_number / POINTS)[:, None] * np.stack([np.cos(_turn), np.sin(_turn)], axis=1)  # evenly over the disc


def all_visible(objects: Sequence[SceneObject], camera: Camera, min_pixels: float) -> bool:
    """Whether every object is the nearest one at `min_pixels` or more pixel centres of a 480x320 image.

    The ground hides nothing here, as in CLEVR's generator; what lies beyond the border of the image is not seen.
    """
    if not objects or min_pixels <= 0:
        return True
    doubtful = np.flatnonzero(visible_bound(objects, camera) < CERTAIN * min_pixels)
    return all(count_visible(objects, number, camera) >= min_pixels for number in doubtful)


def visible_bound(objects: Sequence[SceneObject], camera: Camera) -> np.ndarray:
    """At least so many pixels `[n]` of 480x320 each object shows, roughly."""
    centre = np.array([obj.coords for obj in objects])
    half = np.array([HALF_SIZE[obj.size] for obj in objects])
    points = centre[:, None] + half[:, None, None] * (DISC @ camera.axes()[:2])
    px, py, depth = np.moveaxis(camera.project(points, WIDTH, HEIGHT), -1, 0)
    inside = (depth > NEAR) & (px > 0) & (px < WIDTH) & (py > 0) & (py < HEIGHT)
    before = cylinders_before(objects, camera, points - camera.location)
    before[np.arange(len(objects)), np.arange(len(objects))] = False
    share = (inside & ~before.any(axis=0)).mean(axis=1)
    return share * math.pi * (half * FOCAL * WIDTH / np.maximum(depth.mean(axis=1), NEAR)) ** 2


def cylinders_before(objects: Sequence[SceneObject], camera: Camera, rays: np.ndarray) -> np.ndarray:
    """Whether the upright cylinder around each object stands between the camera and the ends of `rays` `[..., 3]`.

    With the camera at 0 and the end at 1: the ray enters the cylinder's circle before 1, and is below the cylinder's
    top where it leaves the circle, or at 1. The result is `[objects, ...]`.
    """
    x, y, z = np.moveaxis(rays, -1, 0)[:, None]
    shape = (3, len(objects), *[1] * (rays.ndim - 1))
    off_x, off_y, off_z = (camera.location - np.array([obj.coords for obj in objects])).T.reshape(shape)
    half = np.array([HALF_SIZE[obj.size] for obj in objects]).reshape(shape[1:])
    radius = half * np.array([RADIUS[obj.shape] for obj in objects]).reshape(shape[1:])
    a = x * x + y * y
    b = off_x * x + off_y * y
    root = b * b - a * (off_x**2 + off_y**2 - radius**2)
    reach = np.sqrt(np.maximum(root, 0))
    leave = np.minimum((reach - b) / a, 1)
    return (root > 0) & (-b - reach < a) & (leave > 0) & (off_z + leave * z < half)


def count_visible(objects: Sequence[SceneObject], number: int, camera: Camera) -> int:
    """Pixel centres of a 480x320 image at which the object of this number is seen before all others."""
    rays = _rays_around(objects[number], camera)
    depth = _depth(objects[number], camera, rays)
    rays, depth = rays[:, np.isfinite(depth)], depth[np.isfinite(depth)]
    seen = np.ones(len(depth), dtype=bool)
    for other, before in enumerate(cylinders_before(objects, camera, (rays * depth).T)):
        if other != number and before.any():
            seen[before] &= _depth(objects[other], camera, rays[:, before]) > depth[before]
    return int(seen.sum())


def _rays_around(obj: SceneObject, camera: Camera) -> np.ndarray:
    """Directions `[3, n]` of depth 1 through the pixel centres of an object's box, cut at the image."""
    corners = HALF_SIZE[obj.size] * np.array([RADIUS[obj.shape], RADIUS[obj.shape], 1]) * CORNERS
    seen = camera.project(obj.coords + corners, WIDTH, HEIGHT)
    low, high = np.zeros(2), np.array([WIDTH, HEIGHT])
    if seen[:, 2].min() > NEAR:  # else the box has no finite picture
        low, high = np.floor(seen[:, :2].min(0)).clip(low, high), np.ceil(seen[:, :2].max(0)).clip(low, high)
    px, py = np.meshgrid(np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5)
    right, up, backward = camera.axes()[:, :, None]
    x = (px.reshape(-1) / WIDTH - 0.5) / FOCAL
    y = (0.5 - py.reshape(-1) / HEIGHT) / (FOCAL * ASPECT)
    return x * right + y * up - backward


def _depth(obj: SceneObject, camera: Camera, rays: np.ndarray) -> np.ndarray:
    """Depth `[n]` at which rays `[3, n]` from the camera first meet an object, `inf` where they do not."""
    c, s = math.cos(obj.rotation), math.sin(obj.rotation)
    to_unit = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) / HALF_SIZE[obj.size]
    origin = to_unit @ np.subtract(camera.location, obj.coords)
    direction = torch.from_numpy(to_unit @ rays)
    hit = HITS[SHAPES.index(obj.shape)](torch.from_numpy(origin)[:, None].expand_as(direction), direction).numpy()
    return np.where(hit > 0, hit, np.inf)
