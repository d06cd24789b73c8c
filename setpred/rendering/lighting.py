"""CLEVR's four lights (exact) and the soft shadows of objects (approximate).

Key, fill and back are square lamps that face the origin and fall off with the square of the distance; the sun is a
distant disc. A blocker at distance a that clears the line to a light's centre by `gap` (negative: it cuts the line)
leaves the share smoothstep(1/2 + gap / (2 a tan)) of the light, where tan is half the light's size over its distance.
Whether the centre is hidden is exact up to the blockers' rounded edges; the shares of several blockers multiply.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.rendering.bodies import Bodies
from setpred.rendering.scenes import SHAPES
from setpred.rendering.shapes import CUBE_EDGE
from setpred.rendering.vectors import dot, normalised, pixels_of, smoothstep, take
from setpred.rendering.visibility import View

TINY = 1e-6


# key, fill and back: radiance times area, and half the side
INTENSITY, HALF_SIDE = (25.0, 7.5, 12.5), (0.25, 0.25, 0.5)
KEY_COLOR, FILL_COLOR = (1.0, 0.9323092, 0.8166636), (0.7616662, 0.8177196, 1.0)  # linear; back and sun are white
SUN_DIRECTION = (0.414496, -0.194583, 0.889005)
SUN_IRRADIANCE = 0.45
SUN_TANGENT = 0.1


class Lights(NamedTuple):
    """Key, fill, back and sun at n points.

    direction: unit vectors towards the lights `[3, 4, n]`; irradiance: on a surface that faces them `[4, n]`;
    tangent: half their size over their distance `[4, n]`.
    """

    direction: Tensor
    irradiance: Tensor
    tangent: Tensor

    def part(self, which: Tensor) -> Lights:
        """The lights at some of the points."""
        return Lights(*(take(part, which) for part in self))


@cache
def lamp_table(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Intensities and half sides of the three lamps and the direction of the sun, each `[3]`."""
    numbers = INTENSITY, HALF_SIDE, SUN_DIRECTION
    return tuple(torch.tensor(part, dtype=torch.float32, device=device) for part in numbers)


def coloured(parts: Tensor) -> Tensor:
    """Linear RGB `[3, n]` of light that comes from the four lights in parts `[4, n]`."""
    key, fill, back, sun = parts
    white = back + sun
    return torch.stack([key * k + fill * f + white for k, f in zip(KEY_COLOR, FILL_COLOR, strict=True)])


def lights_at(points: Tensor, lamps: Tensor) -> Lights:
    """The unblocked lights at points `[3, n]`; `lamps [3, 3, n]` are (x, y, z) of key, fill and back."""
    intensity, half_side, sun = lamp_table(points.device)
    towards = lamps - points[:, None]
    inverse = 1 / dot(towards, towards).sqrt()
    direction = towards * inverse
    facing = dot(direction, normalised(lamps)).clamp(min=0) * intensity[:, None]
    one = torch.ones_like(inverse[:1])
    return Lights(
        torch.cat([direction, sun[:, None, None] * one], dim=1),
        torch.cat([facing * inverse * inverse, SUN_IRRADIANCE * one]),
        torch.cat([half_side[:, None] * inverse, SUN_TANGENT * one]),
    )


def block(lights: Lights, points: Tensor, owner: Tensor, scene: Tensor, bodies: Bodies) -> Lights:
    """The lights that reach points `[3, n]` of scenes `[n]` past the objects.

    `owner [n]` is the object that each point is on, or `GROUND`. An object does not block its own points: all shapes
    are convex, and points on the far side face away from the light.
    """
    count = points.shape[1]
    place, blocker = [scene[:0]], [scene[:0]]
    for others, there in bodies.others(scene):
        to_centre = (take(bodies.centre, others) - points)[:, None]
        near = _may_hide(to_centre, lights.direction, lights.tangent, take(bodies.reach, others))
        place.append((near & ((others != owner) & there)).flatten().nonzero().squeeze(1))
        blocker.append(take(others, place[-1] % count))
    place, blocker = torch.cat(place), torch.cat(blocker)
    return _blocked(lights, points, place, place % count, blocker, bodies)


def block_ground(lights: Lights, points: Tensor, bodies: Bodies, view: View, lamps: Tensor) -> Lights:
    """`block` for the ground in every pixel, points `[3, B * P]`, restricted to where shadows may fall.

    `lamps [3, 3, B]` are (x, y, z) of key, fill and back.
    """
    box, x, y = pixels_of(shadow_boxes(bodies, view, lamps).flatten(0, 1))
    light = box // max(len(bodies), 1)
    blocker = box - light * len(bodies)
    point = (take(bodies.scene, blocker) * view.height + y) * view.width + x
    place = light * points.shape[1] + point
    to_centre = take(bodies.centre, blocker) - take(points, point)
    direction, tangent = take(lights.direction.flatten(1), place), take(lights.tangent.flatten(), place)
    near = _may_hide(to_centre, direction, tangent, take(bodies.reach, blocker)).nonzero().squeeze(1)
    return _blocked(lights, points, *(take(part, near) for part in (place, point, blocker)), bodies)


def _may_hide(to_centre: Tensor, direction: Tensor, tangent: Tensor, reach: Tensor) -> Tensor:
    """Whether the ball around an object comes near the line to a light: a cheap first test."""
    along = dot(to_centre, direction)
    around = reach + tangent * along
    return (dot(to_centre, to_centre) - along * along < around * around) & (along > 0)


def _blocked(lights: Lights, points: Tensor, place: Tensor, point: Tensor, blocker: Tensor, bodies: Bodies) -> Lights:
    """The lights after each of k blockers `[k]` takes its share at `place` = light * n + `point`, `[k]`."""
    irradiance = lights.irradiance.clone()
    direction, tangent = lights.direction.flatten(1), lights.tangent.flatten()
    shape = take(bodies.shape, blocker)
    for index, gap_of in enumerate(GAPS):
        which = (shape == index).nonzero().squeeze(1)
        at = take(place, which)
        gap, along = gap_of(take(points, take(point, which)), take(direction, at), bodies, take(blocker, which))
        share = smoothstep(0.5 + 0.5 * gap / (along * take(tangent, at) + TINY))
        irradiance.view(-1).scatter_reduce_(0, at, share, "prod")
    return lights._replace(irradiance=irradiance)


def shadow_boxes(bodies: Bodies, view: View, lamps: Tensor) -> Tensor:
    """Pixels (left, top, right, bottom) of the ground that each object's shadows may reach: int64 `[4 lights, O, 4]`.

    They contain the hull of the object's foot and its top's shadow on the plane z = 0, penumbra included.
    """
    _, half_side, sun = lamp_table(bodies.half.device)
    reach = torch.where(bodies.shape == SHAPES.index("cube"), 2**0.5 * bodies.half, bodies.half)
    one = reach.new_tensor([-1.0, 1.0])
    side = torch.cartesian_prod(one, one, one[:1] * 0).T[:, :, None]
    foot = torch.stack([*bodies.centre[:2], torch.zeros_like(reach)])[:, None] + side * reach
    top = foot + torch.stack([torch.zeros_like(reach), torch.zeros_like(reach), 2 * bodies.half])[:, None]
    boxes = []
    for light in range(4):
        if light < 3:
            lamp = take(lamps[:, light], bodies.scene)[:, None]
            fall = top[2] / (lamp[2] - top[2]).clamp(min=0.1)
            shadow, penumbra = top + (top - lamp) * fall, half_side[light] * fall
        else:
            fall = top[2] / SUN_DIRECTION[2]
            shadow, penumbra = top - sun[:, None, None] * fall, SUN_TANGENT * fall
        soft = (shadow[:, :, None] + side[:, None] * penumbra[:, None]).flatten(1, 2)
        boxes.append(view.boxes(torch.cat([foot, soft], dim=1), bodies.scene))
    return torch.stack(boxes)


def _sphere_gap(points: Tensor, direction: Tensor, bodies: Bodies, blocker: Tensor) -> tuple[Tensor, Tensor]:
    to_centre = take(bodies.centre, blocker) - points
    along = dot(to_centre, direction).clamp(min=0)
    away = dot(to_centre, to_centre) - along * along
    return away.clamp(min=0).sqrt() - take(bodies.half, blocker), along


def _below_top(points: Tensor, direction: Tensor, bodies: Bodies, blocker: Tensor, edge: float) -> tuple[Tensor, ...]:
    """The part of each light ray between the bottom and top edges of an upright blocker.

    Returns the ray's start relative to the blocker's axis and its direction (x, y each), and the part's begin and end
    along the ray. `edge` is the height of the rounded edges over the half size.
    """
    centre, half = take(bodies.centre, blocker), take(bodies.half, blocker)
    inverse = 1 / direction[2].clamp(min=0.01)
    end = (((2 - edge) * half - points[2]) * inverse).clamp(min=0)
    begin = torch.minimum(((edge * half - points[2]) * inverse).clamp(min=0), end)
    return points[0] - centre[0], points[1] - centre[1], direction[0], direction[1], begin, end


def _cylinder_gap(points: Tensor, direction: Tensor, bodies: Bodies, blocker: Tensor) -> tuple[Tensor, Tensor]:
    x, y, ux, uy, begin, end = _below_top(points, direction, bodies, blocker, 0.03)
    nearest = torch.minimum(torch.maximum(-(x * ux + y * uy) / (ux * ux + uy * uy + TINY), begin), end)
    x, y = x + nearest * ux, y + nearest * uy
    return (x * x + y * y).sqrt() - take(bodies.half, blocker), nearest


def _cube_gap(points: Tensor, direction: Tensor, bodies: Bodies, blocker: Tensor) -> tuple[Tensor, Tensor]:
    """Separating axes of a square and a line segment: the square's two normals and the segment's."""
    x, y, ux, uy, begin, end = _below_top(points, direction, bodies, blocker, 0.08)
    c, s, half = (take(part, blocker) for part in (bodies.cosine, bodies.sine, bodies.half))
    x, y = c * x + s * y, c * y - s * x
    ux, uy = c * ux + s * uy, c * uy - s * ux
    middle, reach = (begin + end) / 2, (end - begin) / 2
    aside_x, aside_y = ux.abs(), uy.abs()
    gap = torch.maximum((x + middle * ux).abs() - reach * aside_x, (y + middle * uy).abs() - reach * aside_y)
    flat = ux * ux + uy * uy + TINY
    length = flat.sqrt()
    rounded = CUBE_EDGE + (1 - CUBE_EDGE) * (aside_x + aside_y) / length
    across = (x * uy - y * ux).abs() / length - half * rounded
    nearest = torch.minimum(torch.maximum(-(x * ux + y * uy) / flat, begin), end)
    return torch.maximum(gap - 0.95 * half, across), nearest


# in the order of `scenes.SHAPES`
GAPS = (_sphere_gap, _cube_gap, _cylinder_gap)
