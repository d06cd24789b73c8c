"""The three shapes in their own unit coordinates: exact ray intersection and surface normals.

Unit coordinates: centre at the origin, half size 1, the cylinder's axis along z. Rays are origin + t * direction,
origin `[3, 1]` or `[3, n]`, direction `[3, n]` of any length, so that t keeps its meaning when world rays are turned
and scaled to unit coordinates. Edges are rounded as in CLEVR's meshes: with e_i = max(|q_i| - (1 - w), 0)/w the surface
is e_x^3 + e_y^3 + e_z^3 = 1, w = 1/4, for the cube, and e_rho^4 + e_z^4 = 1, w = 1/10, for the cylinder.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CUBE_EDGE, CYLINDER_EDGE = 0.25, 0.1
TINY = 1e-12  # keeps divisions finite; far under the rounding of float32 at these sizes
NEWTON_STEPS = 4  # at the rounded edges
ON_SURFACE, GRAZING = 1e-3, 0.03  # of the edges' equations: good enough at once, good enough in the end


def sphere_hit(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """First t at which rays meet the unit sphere, `inf` where they miss: `[n]`."""
    a = (direction * direction).sum(axis=0)
    b = (origin * direction).sum(axis=0)
    root = b * b - a * ((origin * origin).sum(axis=0) - 1)
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)


def cube_hit(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """First t at which rays meet the cube with rounded edges, `inf` where they miss: `[n]`."""
    inverse = 1 / np.where(direction == 0, TINY, direction)
    middle, half = -origin * inverse, np.abs(inverse)
    return _round((middle - half).max(axis=0), (middle + half).min(axis=0), origin, direction, _cube_excess)


def cylinder_hit(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """First t at which rays meet the upright cylinder with rounded rims, `inf` where they miss: `[n]`."""
    (x, y, z), (dx, dy, dz) = origin, direction
    a = dx * dx + dy * dy + TINY
    b = x * dx + y * dy
    root = b * b - a * (x * x + y * y - 1)
    reach = np.sqrt(np.maximum(root, 0))
    inverse = 1 / np.where(dz == 0, TINY, dz)
    middle, half = -z * inverse, np.abs(inverse)
    enter = np.maximum((-b - reach) / a, middle - half)
    leave = np.where(root > 0, np.minimum((reach - b) / a, middle + half), -np.inf)
    return _round(enter, leave, origin, direction, _cylinder_excess)


def _cube_excess(q: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded cube's equation at q (positive outside) and its slope along d."""
    e = np.maximum(np.abs(q) - (1 - CUBE_EDGE), 0) / CUBE_EDGE
    square = e * e
    return (square * e).sum(axis=0) - 1, (square * np.copysign(d, q * d)).sum(axis=0) * (3 / CUBE_EDGE)


def _cylinder_excess(q: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded cylinder's equation at q (positive outside) and its slope along d."""
    (x, y, z), (dx, dy, dz) = q, d
    radius = np.sqrt(x * x + y * y) + TINY
    side = np.maximum(radius - (1 - CYLINDER_EDGE), 0) / CYLINDER_EDGE
    cap = np.maximum(np.abs(z) - (1 - CYLINDER_EDGE), 0) / CYLINDER_EDGE
    side3, cap3 = side * side * side, cap * cap * cap
    slope = side3 * (x * dx + y * dy) / radius + cap3 * np.copysign(dz, z * dz)
    return side3 * side + cap3 * cap - 1, slope * (4 / CYLINDER_EDGE)


def _round(
    enter: np.ndarray, leave: np.ndarray, origin: np.ndarray, direction: np.ndarray, excess: Callable
) -> np.ndarray:
    """First hits of a rounded shape, from where the rays enter and leave the sharp one.

    The excess is convex along a ray, so Newton's iteration from outside comes to the first root from the left; where
    the slope is no longer negative, the ray passes the edge by.
    """
    hit = np.where(enter < leave, enter, np.inf)
    index = np.flatnonzero(enter < leave)
    d, o = direction[:, index], origin if origin.shape[1] == 1 else origin[:, index]
    t = enter[index]
    value, slope = excess(o + t * d, d)
    edge = np.flatnonzero(value > ON_SURFACE)
    if not edge.size:
        return hit
    d, o = d[:, edge], o if o.shape[1] == 1 else o[:, edge]
    index, t, value, slope = index[edge], t[edge], value[edge], slope[edge]
    for _ in range(NEWTON_STEPS):
        t = t - np.where(slope < 0, value / np.minimum(slope, -TINY), 0)
        value, slope = excess(o + t * d, d)
    hit[index] = np.where(value < GRAZING, t, np.inf)
    return hit


def sphere_normal(q: np.ndarray) -> np.ndarray:
    """Outward direction `[3, ...]`, not normalised, at surface points `[3, ...]`."""
    return q


def cube_normal(q: np.ndarray) -> np.ndarray:
    """The gradient of the rounded cube's equation."""
    e = np.maximum(np.abs(q) - (1 - CUBE_EDGE), 0)
    return np.copysign(e * e, q)


def cylinder_normal(q: np.ndarray) -> np.ndarray:
    """The gradient of the rounded cylinder's equation."""
    radius = np.sqrt(q[0] * q[0] + q[1] * q[1]) + TINY
    side = np.maximum(radius - (1 - CYLINDER_EDGE), 0)
    cap = np.maximum(np.abs(q[2]) - (1 - CYLINDER_EDGE), 0)
    side = side * side * side / radius
    return np.stack([side * q[0], side * q[1], np.copysign(cap * cap * cap, q[2])])


HIT = {"sphere": sphere_hit, "cube": cube_hit, "cylinder": cylinder_hit}
NORMAL = {"sphere": sphere_normal, "cube": cube_normal, "cylinder": cylinder_normal}
