"""CLEVR's four lights and the soft shadows that objects cast.

Key, fill and back are square lamps that face the origin and fall off with the square of the distance; the sun is a
disc far away. Points are arrays `[3, n]`. Shadows take each lamp as a disc: a blocker that clears the straight line to
the lamp's centre by `gap` (negative: it cuts it), at distance `a`, leaves smoothstep(1/2 + gap / (2 a tan)) of the
light, where tan is the half size of the lamp over its distance. Whether the centre is hidden is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from setpred.data.visibility import HALF_SIZE, turn

if TYPE_CHECKING:
    from setpred.data.scenes import Scene, SceneObject

TINY = np.float32(1e-6)


class Lamp(NamedTuple):
    """Radiance times area (watts per steradian), half the side, linear colour."""

    intensity: float
    half_side: float
    color: tuple[float, float, float]


LAMPS = {
    "key": Lamp(25.0, 0.25, (1.0, 0.9323092, 0.8166636)),
    "fill": Lamp(7.5, 0.25, (0.7616662, 0.8177196, 1.0)),
    "back": Lamp(12.5, 0.5, (1.0, 1.0, 1.0)),
}
SUN_DIRECTION = np.array([0.414496, -0.194583, 0.889005], dtype=np.float32)
SUN_IRRADIANCE = 0.45
SUN_TANGENT = 0.1


class Light(NamedTuple):
    """What one light sends to n points when nothing blocks it.

    direction: unit vectors towards it, `[3, n]` (or `[3, 1]` for the sun).
    irradiance: on a surface that faces it, `[n]` (or `[1]`).
    tangent: half its size over its distance, `[n]` (or `[1]`).
    color: linear, `[3]`.
    """

    direction: np.ndarray
    irradiance: np.ndarray
    tangent: np.ndarray
    color: np.ndarray


def lights_at(points: np.ndarray, scene: Scene) -> list[Light]:
    """The unblocked light of key, fill, back and sun at points `[3, n]`."""
    lights = []
    for name, lamp in LAMPS.items():
        location = np.array(scene.lamps[name], dtype=np.float32)
        towards = location[:, None] - points
        distance = np.sqrt(dot(towards, towards))
        direction = towards / distance
        facing = np.maximum(dot(direction, (location / np.sqrt(location @ location))[:, None]), 0)
        irradiance = np.float32(lamp.intensity) * facing / distance**2
        color = np.array(lamp.color, dtype=np.float32)
        lights.append(Light(direction, irradiance, np.float32(lamp.half_side) / distance, color))
    sun = np.array([[SUN_IRRADIANCE], [SUN_TANGENT]], dtype=np.float32)
    lights.append(Light(SUN_DIRECTION[:, None], sun[0], sun[1], np.ones(3, dtype=np.float32)))
    return lights


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products of vectors stored along the first axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unshadowed(points: np.ndarray, owner: np.ndarray, light: Light, objects: Sequence[SceneObject]) -> np.ndarray:
    """The part of a light that reaches points `[3, n]` past the objects, `[n]` from 0 to 1.

    `owner [n]` is the object that each point lies on, or -1: an object does not block its own points, since all shapes
    are convex and their far sides face away from the light anyway.
    """
    seen = np.ones(points.shape[1], dtype=np.float32)
    for shape, gap_to in (("sphere", _sphere_gap), ("cylinder", _cylinder_gap), ("cube", _cube_gap)):
        indices = [k for k, obj in enumerate(objects) if obj.shape == shape]
        if not indices:
            continue
        blockers = [objects[k] for k in indices]
        gap, reach = gap_to(points, light, blockers)
        half = np.float32(0.5)
        part = np.clip(half + half * gap / (reach * light.tangent + TINY), 0, 1)
        part = part * part * (3 - 2 * part)
        part[owner == np.array(indices)[:, None]] = 1
        seen = seen * part.prod(axis=0)
    return seen


def _centres(blockers: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    centres = np.array([b.coords for b in blockers], dtype=np.float32).T[:, :, None]
    return centres, np.array([[HALF_SIZE[b.size]] for b in blockers], dtype=np.float32)


def _sphere_gap(points: np.ndarray, light: Light, blockers: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    centres, radius = _centres(blockers)
    to_centre = centres - points[:, None]
    along = np.maximum(dot(to_centre, light.direction), 0)
    away = dot(to_centre, to_centre) - along * along
    return np.sqrt(np.maximum(away, 0)) - radius, along


def _flat(points: np.ndarray, light: Light, blockers: Sequence[SceneObject]):
    """Upright shapes in the ground plane: the part of each light ray that runs below the blocker's top.

    Returns start x, y of the ray relative to the blocker's centre, its direction x, y, the length up to the top, the
    distance to the point nearest the blocker's axis, and the blocker's half size; `[blockers, n]` each.
    """
    centres, half_size = _centres(blockers)
    x, y = points[0] - centres[0], points[1] - centres[1]
    ux, uy, uz = light.direction
    length = np.maximum((2 * half_size - points[2]) / np.maximum(uz, np.float32(0.01)), 0)
    nearest = np.clip(-(x * ux + y * uy) / (ux * ux + uy * uy + TINY), 0, length)
    return x, y, ux, uy, length, nearest, half_size


def _cylinder_gap(points: np.ndarray, light: Light, blockers: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    x, y, ux, uy, _, nearest, radius = _flat(points, light, blockers)
    x, y = x + nearest * ux, y + nearest * uy
    return np.sqrt(x * x + y * y) - radius, nearest


def _cube_gap(points: np.ndarray, light: Light, blockers: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    """Separating axes of a square and a line segment: two sides of the square and the segment's normal."""
    x, y, ux, uy, length, nearest, half = _flat(points, light, blockers)
    matrices = np.array([turn(b.rotation) for b in blockers], dtype=np.float32)
    c, s = matrices[:, 0, 0, None], matrices[:, 1, 0, None]
    x, y = c * x + s * y, c * y - s * x
    ux, uy = c * ux + s * uy, c * uy - s * ux
    reach_x, reach_y = length / 2 * ux, length / 2 * uy
    gap = np.abs(x + reach_x) - np.abs(reach_x)
    gap = np.maximum(gap, np.abs(y + reach_y) - np.abs(reach_y))
    across = (np.abs(x * uy - y * ux) - half * (np.abs(ux) + np.abs(uy))) / np.sqrt(ux * ux + uy * uy + TINY)
    return np.maximum(gap - half, across), nearest
