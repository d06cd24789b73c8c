"""CLEVR's ground: a floor that curves up into a backdrop far behind the objects.

The strip is straight in one horizontal direction, so its height is a function of s = -14.0094 - 0.903208 x +
0.429204 y alone. The profile is convex: a ray leaves the space above it at the nearest of the planes through its
segments, seen from inside.
"""

from __future__ import annotations

import numpy as np

from setpred.rendering.camera import Camera

S_ORIGIN, S_X, S_Y = -14.0094, -0.903208, 0.429204
FRONT, BACK = -23.5, 4.07  # the floor ends behind the camera, the backdrop 23 units up; all beyond is black
LEFT, RIGHT = -26.6, 29.9  # the ends of the strip along (0.429204, 0.903208)
ALBEDO = 0.8
PROFILE_S = [-23.5, -16.0, -14.0, -12.04, -10.25, -8.9, -7.43, -6.11, -5.12, -4.05, -3.10, -2.26, -1.51, -0.96, -0.47]
PROFILE_Z = [0.0, 0.0, 0.006, 0.014, 0.029, 0.049, 0.084, 0.137, 0.198, 0.295, 0.424, 0.591, 0.804, 1.021, 1.279]
PROFILE_S = np.array([*PROFILE_S, 0.37, 1.05, 1.60, 2.21, 2.82, 4.07])
PROFILE_Z = np.array([*PROFILE_Z, 1.940, 2.828, 3.992, 6.183, 9.934, 23.1])
SLOPES = (np.diff(PROFILE_Z) / np.diff(PROFILE_S))[:, None]
OFFSETS = PROFILE_Z[:-1, None] - SLOPES * PROFILE_S[:-1, None]
MIDDLES = (PROFILE_S[:-1] + PROFILE_S[1:]) / 2
SLOPES, OFFSETS = SLOPES.astype(np.float32), OFFSETS.astype(np.float32)
FAR = 1e4
HORIZON = 60.0  # the backdrop fills CLEVR's view; a camera that looks over it sees its colour there


def along_profile(points: np.ndarray) -> np.ndarray:
    """The coordinate s `[n]` of points `[3, n]`."""
    return S_ORIGIN + S_X * points[0] + S_Y * points[1]


def floor_height(points: np.ndarray) -> np.ndarray:
    """Height `[n]` of the ground under points `[3, n]`."""
    return np.interp(along_profile(points), PROFILE_S, PROFILE_Z)


def ground_hit(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The t `[n]` at which rays (origin, direction `[3, n]`) meet the ground, `FAR` where they never do."""
    s = along_profile(origin)
    ds = S_X * direction[0] + S_Y * direction[1]
    above = np.maximum(origin[2] - (SLOPES * s + OFFSETS), 1e-6)
    inverse = ((SLOPES * ds - direction[2]) / above).max(axis=0)
    t = 1 / np.maximum(inverse, 1 / FAR)
    reached = s + t * ds
    aside = S_Y * (origin[0] + t * direction[0]) - S_X * (origin[1] + t * direction[1])
    on_strip = (reached > FRONT) & (reached < BACK) & (aside > LEFT) & (aside < RIGHT)
    return np.where(on_strip, t, FAR)


def ground_seen(camera: Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the rays x right + y up - backward of a camera meet the ground: `[3, height, width]`.

    One over the depth of a plane is linear in x `[width]` and y `[height]`; the nearest plane has the largest.
    """
    axes = camera.axes() * [[1], [1], [-1]]
    location = np.array(camera.location)
    above = location[2] - (SLOPES * along_profile(location) + OFFSETS)
    inverse = (SLOPES * (S_X * axes[:, 0] + S_Y * axes[:, 1]) - axes[:, 2]) / above
    along_x, along_y, ahead = inverse.T[:, :, None, None].astype(np.float32)
    depth = 1 / np.maximum((along_x * x + (along_y * y[:, None] + ahead)).max(axis=0), 1 / HORIZON)
    right, up, forward = axes.astype(np.float32)[:, :, None, None]
    return location.astype(np.float32)[:, None, None] + depth * (right * x + (up * y[:, None] + forward))


def ground_normal(points: np.ndarray) -> np.ndarray:
    """Upward unit normals `[3, n]` of the ground under points `[3, n]`."""
    slope = np.interp(along_profile(points), MIDDLES, SLOPES[:, 0]).astype(np.float32)
    up = 1 / np.sqrt(1 + slope * slope)
    return np.stack([-S_X * slope * up, -S_Y * slope * up, up])
