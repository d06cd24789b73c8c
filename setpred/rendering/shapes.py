"""The three shapes in unit coordinates: exact ray intersections and surface normals.

Unit coordinates: centre at the origin, half size 1, the cylinder's axis along z. Rays are origin + t * direction, both
`[3, n]`, the direction of any length, so t is the same in the world and in unit coordinates. Edges are rounded as in
CLEVR's meshes: with e_i = max(|q_i| - (1 - w), 0)/w the surface is e_x^3 + e_y^3 + e_z^3 = 1, w = 1/4, for the cube,
and e_rho^4 + e_z^4 = 1, w = 1/10, for the cylinder.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from setpred.rendering.vectors import dot, take

CUBE_EDGE, CYLINDER_EDGE = 0.25, 0.1
TINY = 1e-12  # keeps divisions finite; far under the rounding of float32 at these sizes
NEWTON_STEPS = 4  # at the rounded edges
ON_SURFACE, GRAZING = 1e-3, 0.03  # tolerances of the edges' equations: before and after Newton's iteration
MISS = torch.inf


def sphere_hit(origin: Tensor, direction: Tensor) -> Tensor:
    """First t at which rays meet the unit sphere, `MISS` where they do not: `[n]`."""
    a, b = dot(direction, direction), dot(origin, direction)
    root = b * b - a * (dot(origin, origin) - 1)
    return torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / a, MISS)


def cube_hit(origin: Tensor, direction: Tensor) -> Tensor:
    """First t at which rays meet the cube with rounded edges, `MISS` where they do not: `[n]`."""
    inverse = 1 / torch.where(direction == 0, TINY, direction)
    middle, half = -origin * inverse, inverse.abs()
    return _round((middle - half).amax(0), (middle + half).amin(0), origin, direction, _cube_excess)


def cylinder_hit(origin: Tensor, direction: Tensor) -> Tensor:
    """First t at which rays meet the upright cylinder with rounded rims, `MISS` where they do not: `[n]`."""
    (x, y, z), (dx, dy, dz) = origin, direction
    a = dx * dx + dy * dy + TINY
    b = x * dx + y * dy
    root = b * b - a * (x * x + y * y - 1)
    reach = root.clamp(min=0).sqrt()
    inverse = 1 / torch.where(dz == 0, TINY, dz)
    middle, half = -z * inverse, inverse.abs()
    enter = torch.maximum((-b - reach) / a, middle - half)
    leave = torch.where(root > 0, torch.minimum((reach - b) / a, middle + half), -MISS)
    return _round(enter, leave, origin, direction, _cylinder_excess)


def _cube_excess(q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded cube's equation at q (positive outside) and its slope along d."""
    e = (q.abs() - (1 - CUBE_EDGE)).clamp(min=0) / CUBE_EDGE
    square = e * e
    return dot(square, e) - 1, dot(square, torch.copysign(d, q * d)) * (3 / CUBE_EDGE)


def _cylinder_excess(q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded cylinder's equation at q (positive outside) and its slope along d."""
    (x, y, z), (dx, dy, dz) = q, d
    radius = (x * x + y * y).sqrt() + TINY
    side = (radius - (1 - CYLINDER_EDGE)).clamp(min=0) / CYLINDER_EDGE
    cap = (z.abs() - (1 - CYLINDER_EDGE)).clamp(min=0) / CYLINDER_EDGE
    side3, cap3 = side * side * side, cap * cap * cap
    slope = side3 * (x * dx + y * dy) / radius + cap3 * torch.copysign(dz, z * dz)
    return side3 * side + cap3 * cap - 1, slope * (4 / CYLINDER_EDGE)


def _round(
    enter: Tensor, leave: Tensor, origin: Tensor, direction: Tensor, excess: Callable[[Tensor, Tensor], tuple]
) -> Tensor:
    """First hits of a rounded shape, given where the rays enter and leave the sharp one.

    The excess is convex along a ray, so Newton's iteration from outside reaches the first root from the left; a slope
    that is no longer negative means that the ray misses the edge.
    """
    hit = torch.where(enter < leave, enter, MISS)
    index = (enter < leave).nonzero().squeeze(1)
    o, d, t = take(origin, index), take(direction, index), take(enter, index)
    value, slope = excess(o + t * d, d)
    edge = (value > ON_SURFACE).nonzero().squeeze(1)
    index, o, d, t, value, slope = (take(part, edge) for part in (index, o, d, t, value, slope))
    for _ in range(NEWTON_STEPS):
        t = t - torch.where(slope < 0, value / slope.clamp(max=-TINY), 0)
        value, slope = excess(o + t * d, d)
    hit[index] = torch.where(value < GRAZING, t, MISS)
    return hit


def sphere_normal(q: Tensor) -> Tensor:
    """Outward direction `[3, ...]`, not normalised, at surface points `[3, ...]`."""
    return q


def cube_normal(q: Tensor) -> Tensor:
    """The gradient of the rounded cube's equation."""
    e = (q.abs() - (1 - CUBE_EDGE)).clamp(min=0)
    return torch.copysign(e * e, q)


def cylinder_normal(q: Tensor) -> Tensor:
    """The gradient of the rounded cylinder's equation."""
    radius = (q[0] * q[0] + q[1] * q[1]).sqrt() + TINY
    side = (radius - (1 - CYLINDER_EDGE)).clamp(min=0)
    cap = (q[2].abs() - (1 - CYLINDER_EDGE)).clamp(min=0)
    side = side * side * side / radius
    return torch.stack([side * q[0], side * q[1], torch.copysign(cap * cap * cap, q[2])])


# in the order of `scenes.SHAPES`
HITS = (sphere_hit, cube_hit, cylinder_hit)
REACH = (1.0, 1.6, 2**0.5)  # of a ball around the shape
NORMALS = (sphere_normal, cube_normal, cylinder_normal)
