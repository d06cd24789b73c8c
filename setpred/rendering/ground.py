"""CLEVR's ground: a floor that curves up into a backdrop far behind the objects. Exact.

The strip is straight in one horizontal direction, so its height is a function of s = -14.0094 - 0.903208 x +
0.429204 y alone. The profile is convex: a ray leaves the space above it at the nearest of the planes through its
segments, seen from inside.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.rendering.vectors import take

S_ORIGIN, S_X, S_Y = -14.0094, -0.903208, 0.429204
FRONT, BACK = -23.5, 4.07  # the floor ends behind the camera, the backdrop 23 units up; all beyond is black
LEFT, RIGHT = -26.6, 29.9  # the ends of the strip along (0.429204, 0.903208)
ALBEDO = 0.8
PROFILE = (
    (-23.5, 0.0),
    (-16.0, 0.0),
    (-14.0, 0.006),
    (-12.04, 0.014),
    (-10.25, 0.029),
    (-8.9, 0.049),
    (-7.43, 0.084),
    (-6.11, 0.137),
    (-5.12, 0.198),
    (-4.05, 0.295),
    (-3.10, 0.424),
    (-2.26, 0.591),
    (-1.51, 0.804),
    (-0.96, 1.021),
    (-0.47, 1.279),
    (0.37, 1.940),
    (1.05, 2.828),
    (1.60, 3.992),
    (2.21, 6.183),
    (2.82, 9.934),
    (4.07, 23.1),
)  # fmt: skip  (s, height)
FAR = 1e4
HORIZON = 60.0  # the backdrop fills CLEVR's view; a camera that looks over it sees its colour there


class Profile(NamedTuple):
    """The profile's corners (s, height) and, for each piece between two, its middle, slope and height at s = 0."""

    s: Tensor
    height: Tensor
    middle: Tensor
    slope: Tensor
    offset: Tensor


@cache
def profile(device: torch.device) -> Profile:
    s, height = torch.tensor(PROFILE, dtype=torch.float64).T
    slope = height.diff() / s.diff()
    parts = (s, height, (s[:-1] + s[1:]) / 2, slope, height[:-1] - slope * s[:-1])
    return Profile(*(part.float().to(device) for part in parts))


def along_profile(points: Tensor) -> Tensor:
    """The coordinate s `[...]` of points `[3, ...]`."""
    return S_ORIGIN + S_X * points[0] + S_Y * points[1]


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant outside, at x `[n]`."""
    right = torch.bucketize(x, knots).clamp(1, len(knots) - 1)
    low, high, base, top = (take(part, index) for part in (knots, values) for index in (right - 1, right))
    return base + ((x - low) / (high - low)).clamp(0, 1) * (top - base)


def floor_height(points: Tensor) -> Tensor:
    """Height `[...]` of the ground under points `[3, ...]`."""
    shape = profile(points.device)
    return interpolate(along_profile(points), shape.s, shape.height)


def ground_normal(points: Tensor) -> Tensor:
    """Upward unit normals `[3, ...]` of the ground under points `[3, ...]`."""
    shape = profile(points.device)
    slope = interpolate(along_profile(points), shape.middle, shape.slope)
    up = 1 / (1 + slope * slope).sqrt()
    return torch.stack([-S_X * slope * up, -S_Y * slope * up, up])


def ground_hit(origin: Tensor, direction: Tensor) -> Tensor:
    """The t `[n]` at which rays (origin, direction `[3, n]`) meet the ground, `FAR` where they never do."""
    s = along_profile(origin)
    ds = S_X * direction[0] + S_Y * direction[1]
    inverse = torch.full_like(s, 1 / FAR)
    shape = profile(s.device)
    for slope, offset in zip(shape.slope, shape.offset, strict=True):
        above = (origin[2] - (slope * s + offset)).clamp(min=1e-6)
        inverse = torch.maximum(inverse, (slope * ds - direction[2]) / above)
    t = 1 / inverse
    reached = s + t * ds
    aside = S_Y * (origin[0] + t * direction[0]) - S_X * (origin[1] + t * direction[1])
    on_strip = (reached > FRONT) & (reached < BACK) & (aside > LEFT) & (aside < RIGHT)
    return torch.where(on_strip, t, FAR)


def ground_depth(origin: Tensor, right: Tensor, up: Tensor, backward: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Depth at which rays right * x + up * y - backward `[3, B]` meet the ground: `[B, height, width]`.

    One over the depth of a plane is linear in x `[width]` and y `[height]`; the nearest plane has the largest.
    """
    shape = profile(x.device)
    above = (origin[2] - (shape.slope[:, None] * along_profile(origin) + shape.offset[:, None])).clamp(min=1e-6)
    across, down, ahead = (
        ((shape.slope[:, None] * (S_X * axis[0] + S_Y * axis[1]) - axis[2]) / above)[..., None, None]
        for axis in (right, up, -backward)
    )
    inverse = x.new_full((origin.shape[1], len(y), len(x)), 1 / HORIZON)
    for piece in range(len(shape.slope)):
        column = down[piece] * y[:, None] + ahead[piece]
        inverse = torch.maximum(inverse, across[piece] * x + column)
    return 1 / inverse
