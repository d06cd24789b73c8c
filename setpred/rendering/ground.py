"""CLEVR's ground: a floor that curves up into a backdrop far behind the objects. Exact.

The strip is straight in one horizontal direction: its height depends on s = -14.0094 - 0.903208 x + 0.429204 y alone.
The profile is convex, so a ray from above meets the ground at the nearest of the planes through its segments.
"""

from functools import cache

import torch
from torch import Tensor

from setpred.rendering.vectors import take

S_ORIGIN, S_X, S_Y = -14.0094, -0.903208, 0.429204
FRONT, BACK = -23.5, 4.07  # the floor ends behind the camera, the backdrop 23 units up; beyond it is black
LEFT, RIGHT = -26.6, 29.9  # the ends of the strip along (0.429204, 0.903208)
ALBEDO = 0.8
PROFILE = (  # (s, height)
    (-23.5, 0.0), (-16.0, 0.0), (-14.0, 0.006), (-12.04, 0.014), (-10.25, 0.029), (-8.9, 0.049), (-7.43, 0.084),
    (-6.11, 0.137), (-5.12, 0.198), (-4.05, 0.295), (-3.10, 0.424), (-2.26, 0.591), (-1.51, 0.804), (-0.96, 1.021),
    (-0.47, 1.279), (0.37, 1.940), (1.05, 2.828), (1.60, 3.992), (2.21, 6.183), (2.82, 9.934), (4.07, 23.1),
)  # fmt: skip
FAR = 1e4
HORIZON = 60.0  # the backdrop fills CLEVR's view; above it the ground is taken to be this far away


@cache
def profile(device: torch.device) -> tuple[Tensor, ...]:
    """The profile's corners (s, height); slope, height at s = 0 and middle of each piece between two."""
    s, height = torch.tensor(PROFILE, dtype=torch.float64).T
    slope = height.diff() / s.diff()
    parts = (s, height, slope, height[:-1] - slope * s[:-1], (s[:-1] + s[1:]) / 2)
    return tuple(part.float().to(device) for part in parts)


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
    s, height, *_ = profile(points.device)
    return interpolate(along_profile(points), s, height)


def ground_normal(points: Tensor) -> Tensor:
    """Upward unit normals `[3, ...]` of the ground under points `[3, ...]`."""
    _, _, slope, _, middle = profile(points.device)
    slope = interpolate(along_profile(points), middle, slope)
    up = 1 / (1 + slope * slope).sqrt()
    return torch.stack([-S_X * slope * up, -S_Y * slope * up, up])


def ground_hit(origin: Tensor, direction: Tensor) -> Tensor:
    """The t `[n]` at which rays (origin, direction `[3, n]`) meet the ground, `FAR` where they do not."""
    s = along_profile(origin)
    ds = S_X * direction[0] + S_Y * direction[1]
    inverse = torch.full_like(s, 1 / FAR)
    _, _, slopes, offsets, _ = profile(s.device)
    for slope, offset in zip(slopes, offsets, strict=True):
        above = (origin[2] - (slope * s + offset)).clamp(min=1e-6)
        inverse = torch.maximum(inverse, (slope * ds - direction[2]) / above)
    t = 1 / inverse
    reached = s + t * ds
    aside = S_Y * (origin[0] + t * direction[0]) - S_X * (origin[1] + t * direction[1])
    on_strip = (reached > FRONT) & (reached < BACK) & (aside > LEFT) & (aside < RIGHT)
    return torch.where(on_strip, t, FAR)


def ground_depth(origin: Tensor, right: Tensor, up: Tensor, backward: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Depth `[B, height, width]` at which rays right * x + up * y - backward `[3, B]` meet the ground.

    One over the depth of a plane is linear in x `[width]` and y `[height]`, and largest for the nearest plane.
    """
    slope, offset = (part[:, None] for part in profile(x.device)[2:4])
    above = (origin[2] - (slope * along_profile(origin) + offset)).clamp(min=1e-6)
    across, down, ahead = (
        ((slope * (S_X * axis[0] + S_Y * axis[1]) - axis[2]) / above)[..., None, None]
        for axis in (right, up, -backward)
    )
    inverse = x.new_full((origin.shape[1], len(y), len(x)), 1 / HORIZON)
    for piece in range(len(slope)):
        column = down[piece] * y[:, None] + ahead[piece]
        inverse = torch.maximum(inverse, across[piece] * x + column)
    return 1 / inverse
