"""CLEVR's four lights and the soft shadows that objects cast.

Key, fill and back are square lamps that face the origin and fall off with the square of the distance; the sun is a
disc far away. A blocker that clears the straight line to a light's centre by `gap` (negative: it cuts it) at distance
a leaves the share smoothstep(1/2 + gap / (2 a tan)) of the light, where tan is half the light's size over its
distance. Whether the centre is hidden is exact up to the blockers' rounded edges.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from setpred.rendering.bodies import SHAPES, Bodies
from setpred.rendering.camera import Camera
from setpred.rendering.shapes import CUBE_EDGE
from setpred.rendering.visibility import pixel_boxes

TINY = 1e-6


class Lamp(NamedTuple):
    """Radiance times area (a lamp's strength straight ahead), half its side, linear colour."""

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
LIGHT_COLORS = np.array([lamp.color for lamp in LAMPS.values()] + [(1, 1, 1)], dtype=np.float32)


class Lights(NamedTuple):
    """What key, fill, back and sun send to n points.

    direction: unit vectors towards them `[3, 4, n]`; irradiance: on a surface that faces them `[4, n]`;
    tangent: half their size over their distance `[4, n]`.
    """

    direction: np.ndarray
    irradiance: np.ndarray
    tangent: np.ndarray

    def part(self, which: slice) -> Lights:
        """The lights of some of the points."""
        return Lights(self.direction[..., which], self.irradiance[:, which], self.tangent[:, which])


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products of vectors stored along the first axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def lights_at(points: np.ndarray, lamps: dict[str, tuple[float, float, float]]) -> Lights:
    """The unblocked lights at points `[3, n]`, `lamps` being the locations of key, fill and back."""
    number = points.shape[1]
    direction = np.empty((3, len(LAMPS) + 1, number), dtype=np.float32)
    irradiance = np.full((len(LAMPS) + 1, number), SUN_IRRADIANCE, dtype=np.float32)
    tangent = np.full((len(LAMPS) + 1, number), SUN_TANGENT, dtype=np.float32)
    direction[:, -1] = SUN_DIRECTION[:, None]
    for index, (name, lamp) in enumerate(LAMPS.items()):
        location = np.array(lamps[name], dtype=np.float32)
        towards = location[:, None] - points
        inverse = 1 / np.sqrt(dot(towards, towards))
        direction[:, index] = towards * inverse
        facing = location * np.float32(lamp.intensity / np.sqrt(location @ location))
        irradiance[index] = np.maximum(dot(direction[:, index], facing), 0) * inverse * inverse
        tangent[index] = lamp.half_side * inverse
    return Lights(direction, irradiance, tangent)


def block(lights: Lights, points: np.ndarray, owner: np.ndarray, bodies: Bodies) -> Lights:
    """The lights that reach points `[3, n]` past the objects.

    `owner [n]` is the object that each point lies on, or -1. An object does not block its own points: all shapes are
    convex, and points on their far sides are turned away from the light anyway.
    """
    irradiance = lights.irradiance
    for shape in range(len(SHAPES)):
        blockers = np.flatnonzero(bodies.shape == shape)[:, None, None]
        if blockers.size:
            share = _share(points[:, None, None], lights.direction[:, None], lights.tangent, bodies, blockers, shape)
            share[np.broadcast_to(owner == blockers, share.shape)] = 1
            irradiance = irradiance * share.prod(axis=0)
    return lights._replace(irradiance=irradiance)


def block_inside(lights: Lights, points: np.ndarray, bodies: Bodies, boxes: np.ndarray, width: int) -> Lights:
    """`block` for the ground behind an image of this width, points `[3, pixels]`, looking only inside pixel boxes.

    `boxes [4, objects, 4]` are those of `shadow_boxes`; outside of them nothing is in shadow.
    """
    irradiance = lights.irradiance.copy()
    direction, tangent = lights.direction.reshape(3, -1), lights.tangent.reshape(-1)
    for shape in range(len(SHAPES)):
        blockers = np.flatnonzero(bodies.shape == shape)
        pixels = [
            (np.arange(top, bottom)[:, None] * width + np.arange(left, right)).reshape(-1)
            for left, top, right, bottom in boxes[:, blockers].reshape(-1, 4)
        ]
        if not pixels:
            continue
        sizes = [len(part) for part in pixels]
        pixel = np.concatenate(pixels)
        light = np.repeat(np.repeat(np.arange(len(boxes)), len(blockers)), sizes)
        blocker = np.repeat(np.tile(blockers, len(boxes)), sizes)
        place = light * points.shape[1] + pixel
        share = _share(points[:, pixel], direction[:, place], tangent[place], bodies, blocker, shape)
        np.multiply.at(irradiance.reshape(-1), place, share)
    return lights._replace(irradiance=irradiance)


def shadow_boxes(
    bodies: Bodies,
    lamps: dict[str, tuple[float, float, float]],
    camera: Camera,
    width: int,
    height: int,
    *,
    aspect: float,
) -> np.ndarray:
    """Pixels (left, top, right, bottom) that each object's shadows may reach: int `[4, objects, 4]`.

    They lie in the hull of the object's outline and its shadow on the plane z = 0, penumbra included.
    """
    reach = bodies.half * np.where(bodies.shape == SHAPES.index("cube"), np.float32(np.sqrt(2)), 1)
    side = np.array([(x, y, 0) for x in (-1, 1) for y in (-1, 1)], dtype=np.float32).T[:, :, None]
    foot = bodies.centre[:, None] * [[[1]], [[1]], [[0]]] + side * reach
    top = foot + [[[0]], [[0]], [[2]]] * bodies.half
    hulls = []
    for name, lamp in LAMPS.items():
        location = np.array(lamps[name])[:, None, None]
        fall = top[2] / np.maximum(location[2] - top[2], 0.1)
        hulls.append(_soft(top + (top - location) * fall, lamp.half_side * fall, side))
    fall = top[2] / SUN_DIRECTION[2]
    hulls.append(_soft(top - SUN_DIRECTION[:, None, None] * fall, SUN_TANGENT * fall, side))
    points = np.stack([np.concatenate([foot, top, hull], axis=1) for hull in hulls], axis=2)
    boxes = pixel_boxes(points.reshape(*points.shape[:2], len(hulls) * len(bodies)), camera, width, height, aspect)
    return boxes.reshape(len(hulls), len(bodies), 4)


def _soft(corners: np.ndarray, penumbra: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Corners `[3, 4, n]`, each replaced by four that leave room for the penumbra."""
    return (corners[:, :, None] + side[:, None] * penumbra[:, None]).reshape(3, 16, corners.shape[2])


def _share(
    points: np.ndarray, direction: np.ndarray, tangent: np.ndarray, bodies: Bodies, blocker: np.ndarray, shape: int
) -> np.ndarray:
    """The share of a light that passes blockers of one shape; all arguments broadcast."""
    gap, along = GAPS[shape](points, direction, bodies, blocker)
    share = np.clip(0.5 + 0.5 * gap / (along * tangent + TINY), 0, 1)
    return share * share * (3 - 2 * share)


def _sphere_gap(
    points: np.ndarray, direction: np.ndarray, bodies: Bodies, blocker: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    to_centre = bodies.centre[:, blocker] - points
    along = np.maximum(dot(to_centre, direction), 0)
    away = dot(to_centre, to_centre) - along * along
    return np.sqrt(np.maximum(away, 0)) - bodies.half[blocker], along


def _below_top(points: np.ndarray, direction: np.ndarray, bodies: Bodies, blocker: np.ndarray, edge: float):
    """Upright shapes in the ground plane: the stretch of each light ray between the blocker's bottom and top edges.

    Returns the ray's start relative to the blocker's axis and its direction (x, y each), and where the stretch begins
    and ends along the ray. `edge` is the height of the rounded edges over the half size.
    """
    centre, half = bodies.centre[:, blocker], bodies.half[blocker]
    ux, uy, uz = direction
    inverse = 1 / np.maximum(uz, 0.01)
    end = np.maximum(((2 - edge) * half - points[2]) * inverse, 0)
    begin = np.minimum(np.maximum((edge * half - points[2]) * inverse, 0), end)
    return points[0] - centre[0], points[1] - centre[1], ux, uy, begin, end


def _cylinder_gap(
    points: np.ndarray, direction: np.ndarray, bodies: Bodies, blocker: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, y, ux, uy, begin, end = _below_top(points, direction, bodies, blocker, 0.03)
    nearest = np.minimum(np.maximum(-(x * ux + y * uy) / (ux * ux + uy * uy + TINY), begin), end)
    x, y = x + nearest * ux, y + nearest * uy
    return np.sqrt(x * x + y * y) - bodies.half[blocker], nearest


def _cube_gap(
    points: np.ndarray, direction: np.ndarray, bodies: Bodies, blocker: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Separating axes of a square and a line segment: the square's two normals and the segment's."""
    x, y, ux, uy, begin, end = _below_top(points, direction, bodies, blocker, 0.08)
    c, s, half = bodies.cosine[blocker], bodies.sine[blocker], bodies.half[blocker]
    x, y = c * x + s * y, c * y - s * x
    ux, uy = c * ux + s * uy, c * uy - s * ux
    middle, reach = (begin + end) / 2, (end - begin) / 2
    aside_x, aside_y = np.abs(ux), np.abs(uy)
    gap = np.maximum(
        np.abs(x + middle * ux) - reach * aside_x,
        np.abs(y + middle * uy) - reach * aside_y,
    )
    flat = ux * ux + uy * uy + TINY
    rounded = CUBE_EDGE + (1 - CUBE_EDGE) * (aside_x + aside_y) / np.sqrt(flat)
    across = np.abs(x * uy - y * ux) / np.sqrt(flat) - half * rounded
    nearest = np.minimum(np.maximum(-(x * ux + y * uy) / flat, begin), end)
    return np.maximum(gap - 0.95 * half, across), nearest


_GAPS = {"sphere": _sphere_gap, "cube": _cube_gap, "cylinder": _cylinder_gap}
GAPS = tuple(_GAPS[shape] for shape in SHAPES)
