"""The three shapes in their own unit coordinates: exact ray intersection and surface normals.

Unit coordinates: centre at the origin, half size 1, the cylinder's axis along z. A ray is origin + t * direction with
any direction length; t keeps its meaning when world rays are scaled and turned into unit coordinates. Edges are
rounded as in CLEVR's meshes: with e_i = max(|q_i| - (1 - w), 0)/w the surface is e_x^3 + e_y^3 + e_z^3 = 1, w = 1/4,
for the cube, and e_rho^4 + e_z^4 = 1, w = 1/10, for the cylinder.
"""

from __future__ import annotations

import numpy as np

CUBE_EDGE, CYLINDER_EDGE = 0.25, 0.1
MISS = np.float32(np.inf)
NEWTON_STEPS = 5  # of the rounded edges; leaves well under a thousandth of the half size


def sphere_hit(origin: np.ndarray, direction: tuple[np.ndarray, ...]) -> np.ndarray:
    """First t at which rays meet the unit sphere, `inf` where they miss; `direction` is its x, y and z arrays."""
    a = sum(d * d for d in direction)
    b = sum(o * d for o, d in zip(origin, direction, strict=True))
    root = b * b - a * (origin @ origin - 1)
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, MISS)


def _slab(origin: float, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave -1 <= q <= 1 in one coordinate."""
    inverse = 1 / np.where(direction == 0, np.float32(1e-12), direction)
    centre, half = -origin * inverse, np.abs(inverse)
    return centre - half, centre + half


def cube_hit(origin: np.ndarray, direction: tuple[np.ndarray, ...]) -> np.ndarray:
    """First t at which rays meet the cube with rounded edges, `inf` where they miss."""
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o, d) for o, d in zip(origin, direction, strict=True))
    t = np.maximum(np.maximum(x0, y0), z0)
    t = np.where(t < np.minimum(np.minimum(x1, y1), z1), t, MISS)

    def excess(t: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = -1.0, 0.0
        for k in range(3):
            q = origin[k] + t * d[k]
            e = np.maximum(np.abs(q) - (1 - CUBE_EDGE), 0) / np.float32(CUBE_EDGE)
            value = value + e**3
            slope = slope + e * e * np.copysign(d[k], q * d[k])
        return value, slope * np.float32(3 / CUBE_EDGE)

    return _round(t, direction, excess)


def cylinder_hit(origin: np.ndarray, direction: tuple[np.ndarray, ...]) -> np.ndarray:
    """First t at which rays meet the upright cylinder with rounded rims, `inf` where they miss."""
    dx, dy, dz = direction
    a = dx * dx + dy * dy + np.float32(1e-12)
    b = origin[0] * dx + origin[1] * dy
    root = b * b - a * (origin[0] ** 2 + origin[1] ** 2 - 1)
    half = np.sqrt(np.maximum(root, 0))
    z0, z1 = _slab(origin[2], dz)
    t = np.maximum((-b - half) / a, z0)
    t = np.where((root > 0) & (t < np.minimum((half - b) / a, z1)), t, MISS)

    def excess(t: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y, z = (origin[k] + t * d[k] for k in range(3))
        radius = np.sqrt(x * x + y * y) + np.float32(1e-12)
        side = np.maximum(radius - (1 - CYLINDER_EDGE), 0) / np.float32(CYLINDER_EDGE)
        cap = np.maximum(np.abs(z) - (1 - CYLINDER_EDGE), 0) / np.float32(CYLINDER_EDGE)
        slope = side**3 * (x * d[0] + y * d[1]) / radius + cap**3 * np.copysign(d[2], z * d[2])
        return side**4 + cap**4 - 1, slope * np.float32(4 / CYLINDER_EDGE)

    return _round(t, direction, excess)


def _round(t: np.ndarray, direction: tuple[np.ndarray, ...], excess) -> np.ndarray:
    """Moves hits of the sharp shape inwards to the rounded one, or makes them misses.

    The excess is convex along a ray, so Newton's iteration from outside comes to the first root from the left, and a
    slope that is no longer negative means that the ray passes the edge by.
    """
    where = np.nonzero(t < MISS)
    near = t[where]
    d = [np.broadcast_to(part, t.shape)[where] for part in direction]
    outside = np.flatnonzero(excess(near, d)[0] > 1e-3)
    if outside.size:
        d = [part[outside] for part in d]
        moved = near[outside]
        missed = np.zeros(moved.shape, dtype=bool)
        for _ in range(NEWTON_STEPS):
            value, slope = excess(moved, d)
            missed |= (slope >= 0) & (value > 0)
            moved = moved - np.where(missed, 0, value / np.minimum(slope, np.float32(-1e-6)))
        missed |= excess(moved, d)[0] > 0.1
        near[outside] = np.where(missed, MISS, moved)
        t[where] = near
    return t


def sphere_normal(q: np.ndarray) -> np.ndarray:
    """Outward direction `[3, ...]`, not normalised, at surface points `[3, ...]`."""
    return q


def cube_normal(q: np.ndarray) -> np.ndarray:
    """The gradient of the rounded cube's equation."""
    return np.copysign(np.maximum(np.abs(q) - (1 - CUBE_EDGE), 0) ** 2, q)


def cylinder_normal(q: np.ndarray) -> np.ndarray:
    """The gradient of the rounded cylinder's equation."""
    radius = np.sqrt(q[0] ** 2 + q[1] ** 2) + np.float32(1e-12)
    side = np.maximum(radius - (1 - CYLINDER_EDGE), 0) ** 3 / radius
    cap = np.copysign(np.maximum(np.abs(q[2]) - (1 - CYLINDER_EDGE), 0) ** 3, q[2])
    return np.stack([side * q[0], side * q[1], cap])


HIT = {"sphere": sphere_hit, "cube": cube_hit, "cylinder": cylinder_hit}
NORMAL = {"sphere": sphere_normal, "cube": cube_normal, "cylinder": cylinder_normal}
