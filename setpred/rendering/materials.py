"""Radiance of ground, rubber and metal towards the camera, linear RGB `[3, n]`. Approximate.

CLEVR's rubber is a matt colour under a weak, broad, grey gloss; its metal is a mirror tinted by the colour, six tenths
sharp and four tenths blurred. Indirect light is not traced: constants fitted to CLEVR's renders approximate it.
"""

import math

import torch
from torch import Tensor

from setpred.rendering.bodies import Bodies
from setpred.rendering.ground import ALBEDO, BACK, S_ORIGIN, S_X, S_Y, along_profile
from setpred.rendering.lighting import Lights, coloured
from setpred.rendering.vectors import dot, smoothstep, take

METAL_BLUR, METAL_SHARP, RUBBER_GLOSS = 0.245, 0.01, 0.27  # widths of the lobes
GRAIN = 0.75**2  # width of the lobes along the grain over that across it
METAL_BLURRED_SHARE = 0.4
METAL_REFLECTANCE = 0.86  # the facets of the blurred part lose some light
BACKDROP_TOP = 23.1 / (BACK - S_ORIGIN)  # tangent of the elevation at which the backdrop ends, seen from the origin
BACKDROP_RADIANCE = 0.12
BENT = 0.11  # spread of the normals in a fragment at which one mirror ray and the mean weigh alike
DARKEST_BLUR = 0.09  # the blurred part sees bright floor around any dark mirrored object
GROUND_AMBIENT, GROUND_AMBIENT_SLOPE = 0.014, 0.0008  # at the middle of the floor; per unit towards the backdrop
FLOOR_LIGHT = 0.1005  # from the floor to a surface that faces it, over 2 pi
MIRRORED_METAL, MIRRORED_METAL_FLOOR = 0.07, 0.1  # radiance of white metal in other metal: always; facing the floor
GLOW = 0.1  # radiance of the floor next to an object of reflectance 1, by light from the object


def irradiance(lights: Lights, normals: Tensor) -> Tensor:
    """Direct light on surfaces: linear RGB `[3, n]`."""
    return coloured(lights.irradiance * dot(lights.direction, normals[:, None]).clamp(min=0))


def shade_ground(points: Tensor, normals: Tensor, lights: Lights) -> Tensor:
    """The white, matt ground. Backdrop and floor also light each other, most near the bend."""
    ambient = GROUND_AMBIENT + GROUND_AMBIENT_SLOPE * (along_profile(points) - S_ORIGIN).clamp(-7.5, 11)
    return ALBEDO / math.pi * irradiance(lights, normals) + ambient


def glow(points: Tensor, body: Tensor, bodies: Bodies) -> Tensor:
    """Radiance of the floor at points `[3, n]` by light from objects `body [n]` near them: linear RGB `[3, n]`.

    A ball of half size r fills the share (r / distance)^3 of the sky of a point on the floor.
    """
    away, half = points - take(bodies.centre, body), take(bodies.half, body)
    share = half * half / dot(away, away)
    return take(bodies.color, body) * (GLOW * (share * share.sqrt() - 0.03).clamp(min=0))


def shade_matt(normals: Tensor, color: Tensor, lights: Lights) -> Tensor:
    """A matt object of the given colours `[3, n]`, lit by the lights and, from below, by the floor."""
    return color * (irradiance(lights, normals) / math.pi + FLOOR_LIGHT * (1 - normals[2]))


def fresnel(cosine: Tensor, index: float) -> Tensor:
    """Share of light that a dielectric of this refractive index reflects."""
    g = (index * index - 1 + cosine * cosine).sqrt()
    ratio = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    away = (g - cosine) / (g + cosine)
    return 0.5 * away * away * (1 + ratio * ratio)


def surroundings(direction: Tensor, blur: float) -> Tensor:
    """Share `[n]` of a blurred reflection in `direction [3, n]` that sees floor or backdrop, not the black above."""
    flat = (direction[0] * direction[0] + direction[1] * direction[1]).sqrt() + 1e-6
    towards = ((S_X * direction[0] + S_Y * direction[1]) / flat).clamp(0, 1)
    top = BACKDROP_TOP * towards * (3 * towards - 1.1).clamp(0, 1)  # the strip's sides are open
    return smoothstep(0.5 + (top / (1 + top * top).sqrt() - direction[2]) / blur)


def highlight(
    view: Tensor, normals: Tensor, lights: Lights, lobes: list[tuple[float, Tensor]], grain: Tensor | None = None
) -> Tensor:
    """Light sources mirrored in a rough surface of reflectance 1 (GGX microfacets): linear RGB `[3, n]`.

    `lobes` are (weight, squared width `[4, n]`) pairs. Along `grain`, unit vectors in the surface `[3, n]`, the lobes
    are 0.75 times as wide, across it 1/0.75 times.
    """
    half = lights.direction + view[:, None]
    along, length = dot(half, normals[:, None]), dot(half, half)
    tilt = along * along / length
    aside = 1 - tilt
    if grain is not None:
        with_grain = dot(half, grain[:, None])
        with_grain = with_grain * with_grain / length
        aside = with_grain / GRAIN + (aside - with_grain) * GRAIN
    to_light = dot(lights.direction, normals[:, None]).clamp(min=0)
    to_view = dot(view, normals).clamp(min=0.05)
    total = torch.zeros_like(tilt)
    for weight, width in lobes:
        root = aside + tilt * width
        shadowing = (to_light * (1 - width / 2) + width / 2) * (to_view * (1 - width / 2) + width / 2)
        total = total + weight * width / (4 * math.pi * root * root * shadowing)
    return coloured(lights.irradiance * to_light * total)


def shade_rubber(normals: Tensor, view: Tensor, color: Tensor, spread: Tensor, lights: Lights) -> Tensor:
    """A matt colour under a grey gloss that grows towards the rim.

    normals, view (unit, towards the camera), color: `[3, n]`; spread of the normals within each point's pixel: `[n]`.
    """
    cosine = dot(view, normals).clamp(min=0)
    gloss = fresnel(cosine, 1.2)
    matt = (1 - 0.6 * fresnel(cosine, 1.4)) * shade_matt(normals, color, lights)
    mirror = 2 * cosine * normals - view
    shine = highlight(view, normals, lights, [(1.0, RUBBER_GLOSS**2 + spread)])
    return (1 - gloss) * matt + 0.8 * gloss * (shine + BACKDROP_RADIANCE * surroundings(mirror, 1.0))


def shade_mirrored_metal(normals: Tensor, color: Tensor, direction: Tensor) -> Tensor:
    """Metal seen in other metal along rays `direction [3, n]`; it reflects floor or nothing."""
    onwards = direction - 2 * dot(direction, normals) * normals
    return color * (MIRRORED_METAL + MIRRORED_METAL_FLOOR * surroundings(onwards, 0.5))


def shade_metal(
    normals: Tensor,
    view: Tensor,
    color: Tensor,
    spread: Tensor,
    direction: Tensor,
    mirrored: Tensor,
    lost: Tensor,
    lights: Lights,
    grain: Tensor,
) -> Tensor:
    """A tinted mirror, partly blurred.

    Arguments as for `shade_rubber`; `mirrored [3, n]` is the radiance along the mirror `direction [3, n]`, `lost [n]`
    marks rays that meet nothing, and `grain [3, n]` is as for `highlight`.
    """
    size = lights.tangent * lights.tangent / 6  # the width of the half vectors of a lamp's points
    lobes = [(METAL_BLURRED_SHARE, METAL_BLUR**2 + spread), (1 - METAL_BLURRED_SHARE, METAL_SHARP**2 + spread + size)]
    floor = surroundings(direction, 0.5)
    blurred = torch.where(lost, BACKDROP_RADIANCE, mirrored.clamp(min=DARKEST_BLUR)) * floor
    # one mirror ray does not represent a strongly bent fragment: use the mean of the surroundings
    bent = spread / (spread + BENT)
    sharp = (1 - bent) * torch.where(lost, 0, mirrored) + bent * (BACKDROP_RADIANCE * floor)
    seen = METAL_BLURRED_SHARE * blurred + (1 - METAL_BLURRED_SHARE) * sharp
    return METAL_REFLECTANCE * color * (seen + highlight(view, normals, lights, lobes, grain))
