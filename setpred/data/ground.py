"""CLEVR's ground: a floor that curves up into a backdrop far behind the objects.

The strip is straight in one horizontal direction, so its height is a function of s = -14.0094 - 0.903208 x +
0.429204 y alone. The profile is convex: a ray leaves the space above it at the nearest of the planes through its
segments, seen from inside.
"""

from __future__ import annotations

import numpy as np

S_ORIGIN, S_X, S_Y = -14.0094, -0.903208, 0.429204
FRONT = -23.5  # the floor ends here, behind the camera; above and beyond all is black
BACK = 4.07
ALBEDO = 0.8
PROFILE_S = [-23.5, -14.0, -10.25, -7.43, -5.12, -3.10, -1.51, -0.47, 0.37, 1.05, 1.60, 2.21, 2.82, 4.07]
PROFILE_Z = [0.0, 0.0, 0.029, 0.084, 0.198, 0.424, 0.804, 1.279, 1.940, 2.828, 3.992, 6.183, 9.934, 23.1]
PROFILE = np.stack([PROFILE_S, PROFILE_Z], axis=1)
SLOPES = np.diff(PROFILE[:, 1]) / np.diff(PROFILE[:, 0])
OFFSETS = (PROFILE[:-1, 1] - SLOPES * PROFILE[:-1, 0])[:, None].astype(np.float32)
SLOPES = SLOPES[:, None].astype(np.float32)
FAR = np.float32(1e4)


def ground_hit(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The t at which rays (origin `[3, 1 or n]`, direction `[3, n]`) meet the ground, `FAR` where they never do."""
    s = S_ORIGIN + S_X * origin[0] + S_Y * origin[1]
    ds = S_X * direction[0] + S_Y * direction[1]
    above = origin[2] - (SLOPES * s + OFFSETS)
    falling = SLOPES * ds - direction[2]
    t = np.where(falling > 1e-6, above / np.maximum(falling, np.float32(1e-6)), FAR).min(axis=0)
    reached = s + t * ds
    return np.where((reached > FRONT) & (reached < BACK), np.minimum(t, FAR), FAR)


def ground_normal(points: np.ndarray) -> np.ndarray:
    """Upward unit normals `[3, n]` of the ground under points `[3, n]`."""
    s = S_ORIGIN + S_X * points[0] + S_Y * points[1]
    middles = (PROFILE[:-1, 0] + PROFILE[1:, 0]) / 2
    slope = np.interp(s, middles, SLOPES[:, 0]).astype(np.float32)
    up = 1 / np.sqrt(1 + slope * slope)
    return np.stack([-S_X * slope * up, -S_Y * slope * up, up]).astype(np.float32)
