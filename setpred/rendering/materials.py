"""How ground, rubber and metal answer the light: radiance towards the camera, linear RGB `[3, n]`.

CLEVR's rubber is a matt colour under a weak, broad, grey gloss; its metal is a mirror tinted by the colour, six tenths
sharp and four tenths blurred. Light that arrives by way of other surfaces is not traced but approximated by constants
that were fitted to CLEVR's own renders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from setpred.rendering.bodies import Bodies
from setpred.rendering.ground import ALBEDO, BACK, S_ORIGIN, S_X, S_Y, along_profile
from setpred.rendering.lighting import LIGHT_COLORS, Lights, dot

PI = np.pi
METAL_BLUR, METAL_SHARP, RUBBER_GLOSS = 0.19, 0.01, 0.35  # widths of the lobes
METAL_BLURRED_SHARE = 0.4
METAL_REFLECTANCE = 0.89  # what the facets of the blurred part do not send on
BACKDROP_TOP = 23.1 / (BACK - S_ORIGIN)  # tangent of the elevation at which the backdrop ends, seen from the origin
BACKDROP_RADIANCE = 0.12
BENT = 0.05  # spread of the normals in a fragment at which one mirror ray and the mean count alike
DARKEST_BLUR = 0.08  # the blurred part sees bright floor around any dark thing that is mirrored
GLOW = 0.13  # radiance of the floor next to an object of reflectance 1, from the light that comes off the object


def irradiance(lights: Lights, normals: np.ndarray) -> np.ndarray:
    """Direct light on surfaces: linear RGB `[3, n]`."""
    received = lights.irradiance * np.maximum(dot(lights.direction, normals[:, None]), 0)
    return np.stack([sum(c * part for c, part in zip(column, received, strict=True)) for column in LIGHT_COLORS.T])


def shade_ground(points: np.ndarray, normals: np.ndarray, lights: Lights) -> np.ndarray:
    """The white, matt ground. It also receives what backdrop and floor send each other, most near the bend."""
    ambient = np.clip(0.013 + 0.0008 * (along_profile(points) + 14), 0.007, 0.022)
    return ALBEDO / PI * irradiance(lights, normals) + ambient


def glow_on_ground(points: np.ndarray, bodies: Bodies, windows: Sequence[tuple[slice, ...]]) -> np.ndarray:
    """What the objects' light adds to the ground around them: linear RGB `[3, ...]` at points `[3, ...]`.

    A ball of half size r fills the share (r / distance)^3 of the sky of a point on the floor. `windows` picks the
    points near enough to each object.
    """
    glow = np.zeros_like(points)
    for index, window in enumerate(windows):
        near = points[:, *window]
        centre, color = (part[:, index].reshape(3, *[1] * len(window)) for part in (bodies.centre, bodies.color))
        away = near - centre
        share = bodies.half[index] ** 2 / dot(away, away)
        glow[:, *window] += color * (GLOW * np.maximum(share * np.sqrt(share) - 0.03, 0))
    return glow


def ambient_on_body(normals: np.ndarray) -> np.ndarray:
    """Light that the floor sends up to the objects `[n]`, over pi."""
    return 0.103 * (1 - normals[2])


def shade_matt(normals: np.ndarray, color: np.ndarray, lights: Lights) -> np.ndarray:
    """A matt object of the given colours `[3, n]`."""
    return color * (irradiance(lights, normals) / PI + ambient_on_body(normals))


def fresnel(cosine: np.ndarray, index: float) -> np.ndarray:
    """The share of light that a dielectric of this refractive index reflects."""
    g = np.sqrt(index**2 - 1 + cosine * cosine)
    ratio = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    return 0.5 * ((g - cosine) / (g + cosine)) ** 2 * (1 + ratio * ratio)


def surroundings(direction: np.ndarray, blur: float) -> np.ndarray:
    """How much of a blurred reflection in `direction [3, n]` sees floor or backdrop, not the black above: `[n]`."""
    flat = np.sqrt(direction[0] ** 2 + direction[1] ** 2) + 1e-6
    towards = np.clip((S_X * direction[0] + S_Y * direction[1]) / flat, 0, 1)
    top = BACKDROP_TOP * towards * np.clip(3 * towards - 1.1, 0, 1)  # the strip's sides are open
    share = np.clip(0.5 + (top / np.sqrt(1 + top * top) - direction[2]) / blur, 0, 1)
    return share * share * (3 - 2 * share)


def highlight(
    view: np.ndarray, normals: np.ndarray, lights: Lights, lobes: list[tuple[float, np.ndarray]]
) -> np.ndarray:
    """Light sources mirrored in a rough surface of reflectance 1: linear RGB `[3, n]`.

    GGX microfacets; `lobes` are (weight, squared width `[4, n]`) pairs.
    """
    half = lights.direction + view[:, None]
    tilt = dot(half, normals[:, None]) ** 2 / dot(half, half)
    to_light = np.maximum(dot(lights.direction, normals[:, None]), 0)
    to_view = np.maximum(dot(view, normals), 0.05)
    total = 0.0
    for weight, width in lobes:
        root = 1 - tilt * (1 - width)
        shadowing = (to_light * (1 - width / 2) + width / 2) * (to_view * (1 - width / 2) + width / 2)
        total = total + weight * width / (4 * PI * root * root * shadowing)
    sent = lights.irradiance * to_light * total
    return np.stack([sum(c * part for c, part in zip(column, sent, strict=True)) for column in LIGHT_COLORS.T])


def shade_rubber(
    normals: np.ndarray, view: np.ndarray, color: np.ndarray, spread: np.ndarray, lights: Lights
) -> np.ndarray:
    """A matt colour under a grey gloss, which grows towards the rim.

    normals, view (unit, towards the camera), color: `[3, n]`; spread of the normals within each point's pixel: `[n]`.
    """
    cosine = np.maximum(dot(view, normals), 0)
    gloss = fresnel(cosine, 1.2)
    matt = (1 - 0.6 * fresnel(cosine, 1.4)) * shade_matt(normals, color, lights)
    mirror = 2 * cosine * normals - view
    shine = highlight(view, normals, lights, [(1.0, RUBBER_GLOSS**2 + spread)])
    return (1 - gloss) * matt + 0.8 * gloss * (shine + BACKDROP_RADIANCE * surroundings(mirror, 1.0))


def shade_mirrored_metal(normals: np.ndarray, color: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Metal as seen in other metal along rays `direction [3, n]`: what it reflects itself is floor or nothing."""
    onwards = direction - 2 * dot(direction, normals) * normals
    return color * (0.07 + 0.1 * surroundings(onwards, 0.5))


def shade_metal(
    normals: np.ndarray,
    view: np.ndarray,
    color: np.ndarray,
    spread: np.ndarray,
    direction: np.ndarray,
    mirrored: np.ndarray,
    lost: np.ndarray,
    lights: Lights,
) -> np.ndarray:
    """A mirror, partly blurred, that tints all it reflects.

    Arguments as for `shade_rubber`; `mirrored [3, n]` is the radiance that arrives along the mirror `direction
    [3, n]`, and `lost [n]` says where that ray meets nothing.
    """
    size = lights.tangent**2 / 6  # the width of the half vectors of a lamp's points
    lobes = [(METAL_BLURRED_SHARE, METAL_BLUR**2 + spread), (1 - METAL_BLURRED_SHARE, METAL_SHARP**2 + spread + size)]
    blurred = np.where(lost, BACKDROP_RADIANCE, np.maximum(mirrored, DARKEST_BLUR)) * surroundings(direction, 0.5)
    # where a fragment bends much, a single mirror ray says little: take the surroundings' mean
    bent = spread / (spread + BENT)
    sharp = (1 - bent) * np.where(lost, 0, mirrored) + bent * (BACKDROP_RADIANCE * surroundings(direction, 0.5))
    seen = METAL_BLURRED_SHARE * blurred + (1 - METAL_BLURRED_SHARE) * sharp
    return METAL_REFLECTANCE * color * (seen + highlight(view, normals, lights, lobes))
