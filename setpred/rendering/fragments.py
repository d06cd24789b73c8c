"""Surface points to shade: what each object shows in each pixel, and what metal mirrors there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from setpred.rendering.bodies import SHAPES, Bodies
from setpred.rendering.camera import Camera
from setpred.rendering.ground import FAR, ground_hit, ground_normal
from setpred.rendering.lighting import dot
from setpred.rendering.shapes import HIT
from setpred.rendering.visibility import GROUND, Visibility


@dataclass(frozen=True)
class Fragments:
    """The objects' visible parts, one entry for every object in every pixel where it shows.

    pixel: flat pixel index `[n]`; owner: object index `[n]`; coverage: share of the pixel `[n]`.
    points, normals: world `[3, n]`, means over the visible part; view: unit vectors towards the camera `[3, n]`.
    spread: how much the normals differ inside the fragment, 1 - |mean|^2 `[n]`.
    """

    pixel: np.ndarray
    owner: np.ndarray
    coverage: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    view: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class Mirrored:
    """Where the mirror rays of metal fragments end.

    fragment: index of the fragment `[m]`; direction: of the ray `[3, m]`; points, normals: of what it meets `[3, m]`;
    owner: the object it meets, or -1 for the ground `[m]`; lost: it meets nothing, bool `[m]` (points then mean
    nothing, but are finite).
    """

    fragment: np.ndarray
    direction: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    owner: np.ndarray
    lost: np.ndarray


def gather_fragments(bodies: Bodies, camera: Camera, visible: Visibility) -> Fragments:
    """Averages each object's samples inside each pixel into one fragment."""
    total, _, width = visible.ids.shape
    pixels = [np.empty(0, dtype=np.intp)]
    for index, (left, top, right, bottom) in enumerate(visible.boxes):
        rows, columns = np.nonzero((visible.ids[:, top:bottom, left:right] == index).any(axis=0))
        pixels.append((rows + top) * width + columns + left)
    owner = np.repeat(np.arange(-1, len(bodies)), [len(part) for part in pixels])
    pixel = np.concatenate(pixels)
    mine = visible.ids.reshape(total, -1)[:, pixel] == owner
    number = mine.sum(axis=0, dtype=np.float32)
    weight = mine / number
    depth = np.where(mine, visible.depth.reshape(total, -1)[:, pixel], 0)
    right, up, backward = camera.axes().astype(np.float32)[:, :, None, None]
    location = np.array(camera.location, dtype=np.float32)
    rays = visible.x[:, pixel % width] * right + (visible.y[:, pixel // width] * up - backward)
    samples = location[:, None, None] + depth * rays
    points = (samples * weight).sum(axis=1)
    normals = (bodies.normals(owner, samples) * weight).sum(axis=1)
    length = np.sqrt(dot(normals, normals)) + 1e-12
    view = location[:, None] - points
    view /= np.sqrt(dot(view, view))
    return Fragments(pixel, owner, number / total, points, normals / length, view, np.maximum(1 - length**2, 0))


def trace_mirror(bodies: Bodies, fragments: Fragments) -> Mirrored:
    """Follows the mirror rays of the metal fragments to the next surface."""
    fragment = np.flatnonzero(bodies.metal[fragments.owner])
    view, normals, origin = (part[:, fragment] for part in (fragments.view, fragments.normals, fragments.points))
    direction = 2 * dot(view, normals) * normals - view
    t = ground_hit(origin, direction)
    owner = np.full(len(fragment), GROUND)
    mine = fragments.owner[fragment]
    for index in range(len(bodies)):
        to_centre = bodies.centre[:, index, None] - origin
        along = dot(to_centre, direction)
        near = dot(to_centre, to_centre) - along * along < 2 * bodies.half[index] ** 2
        rays = np.flatnonzero(near & (along > 0) & (mine != index))
        if rays.size:
            start = bodies.to_unit(index, -to_centre[:, rays])
            hit = HIT[SHAPES[bodies.shape[index]]](start, bodies.to_unit(index, direction[:, rays]))
            nearer = (hit > 0) & (hit < t[rays])
            t[rays[nearer]] = hit[nearer]
            owner[rays[nearer]] = index
    lost = t >= FAR
    points = origin + np.where(lost, 0, t) * direction
    facing = ground_normal(points)
    on_body = np.flatnonzero(owner >= 0)
    facing[:, on_body] = bodies.normals(owner[on_body], points[:, on_body])
    return Mirrored(fragment, direction, points, facing, owner, lost)
