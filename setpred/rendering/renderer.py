"""Pictures of scenes, in NumPy and fast enough for training sets.

The stages can be read one by one: `find_visible` casts rays at the objects; `gather_fragments` makes one point to
shade of every object in every pixel; `trace_mirror` finds what metal reflects; `lights_at` and `block` give the light
that arrives; the materials turn it into radiance; `render` blends by coverage and encodes as sRGB.
"""

from __future__ import annotations

import numpy as np

from setpred.rendering.bodies import Bodies
from setpred.rendering.camera import ASPECT
from setpred.rendering.fragments import gather_fragments, trace_mirror
from setpred.rendering.ground import ground_normal, ground_seen
from setpred.rendering.lighting import block, block_inside, lights_at, shadow_boxes
from setpred.rendering.materials import (
    glow_on_ground,
    shade_ground,
    shade_matt,
    shade_metal,
    shade_mirrored_metal,
    shade_rubber,
)
from setpred.rendering.scenes import Scene
from setpred.rendering.visibility import GROUND, Visibility, find_visible

TABLE_SIZE = 4096


def _srgb_table() -> np.ndarray:
    """8-bit sRGB of the squares of evenly spaced numbers in [0, 1]: fine steps where the curve is steep."""
    linear = (np.arange(TABLE_SIZE) / (TABLE_SIZE - 1)) ** 2
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


SRGB = _srgb_table()


def instance_map(scene: Scene, width: int, height: int, *, aspect: float = ASPECT) -> np.ndarray:
    """Index into `scene.objects` of what is seen at each pixel centre, -1 for the ground: int8 `[height, width]`."""
    return find_visible(Bodies.of(scene.objects), scene.camera, width, height, samples=1, aspect=aspect).ids[0]


def render(scene: Scene, *, width: int, height: int, samples: int = 2, aspect: float = ASPECT) -> np.ndarray:
    """The picture of a scene: uint8 `[height, width, 3]`, sRGB.

    Edges are smoothed with `samples` x `samples` rays in each pixel; `aspect` is the view's width over its height,
    stretched to the image (see `Camera`).
    """
    bodies = Bodies.of(scene.objects)
    visible = find_visible(bodies, scene.camera, width, height, samples=samples, aspect=aspect)
    image = ground_radiance(scene, bodies, visible, aspect=aspect)
    image *= (visible.ids == GROUND).mean(axis=0, dtype=np.float32).reshape(-1)
    if len(bodies):
        pixel, radiance = object_radiance(scene, bodies, visible)
        for channel in range(3):
            image[channel] += np.bincount(pixel, radiance[channel], minlength=height * width)
    image = soften(np.minimum(image, 1).reshape(3, height, width))
    index = np.sqrt(np.maximum(image, 0)) * (TABLE_SIZE - 1) + 0.5
    return np.ascontiguousarray(SRGB[index.astype(np.int16)].transpose(1, 2, 0))


def soften(image: np.ndarray) -> np.ndarray:
    """Weights 1, 10, 1 over twelve along both axes of `[3, height, width]`: CLEVR's pixels are wider than a box."""
    for axis in (1, 2):
        image = np.moveaxis(image, axis, 0)
        soft = image * (10 / 12)
        soft[1:] += image[:-1] / 12
        soft[:-1] += image[1:] / 12
        soft[0] += image[0] / 12
        soft[-1] += image[-1] / 12
        image = np.moveaxis(soft, 0, axis)
    return image


def ground_radiance(scene: Scene, bodies: Bodies, visible: Visibility, *, aspect: float) -> np.ndarray:
    """Linear RGB `[3, pixels]` of the ground behind every pixel, shadows included."""
    _, height, width = visible.ids.shape
    grid = ground_seen(scene.camera, visible.x.mean(axis=0), visible.y.mean(axis=0))
    windows = []
    for left, top, right, bottom in visible.boxes:
        aside, down = right - left, bottom - top
        windows.append(np.s_[max(top - down, 0) : bottom + down, max(left - aside, 0) : right + aside])
    glow = glow_on_ground(grid, bodies, windows).reshape(3, -1)
    points = grid.reshape(3, -1)
    lights = lights_at(points, scene.lamps)
    boxes = shadow_boxes(bodies, scene.lamps, scene.camera, width, height, aspect=aspect)
    lights = block_inside(lights, points, bodies, boxes, width)
    return shade_ground(points, ground_normal(points), lights) + glow


def object_radiance(scene: Scene, bodies: Bodies, visible: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """Flat pixel indices `[n]` and what objects add there, linear RGB times coverage `[3, n]`."""
    seen = gather_fragments(bodies, scene.camera, visible)
    mirror = trace_mirror(bodies, seen)
    points = np.concatenate([seen.points, mirror.points], axis=1)
    lights = lights_at(points, scene.lamps)
    lights = block(lights, points, np.concatenate([seen.owner, mirror.owner]), bodies)
    count = len(seen.pixel)

    ahead = lights.part(slice(count, None))
    floor = shade_ground(mirror.points, mirror.normals, ahead)
    floor += glow_on_ground(mirror.points, bodies, [np.s_[:,]] * len(bodies))
    tint = bodies.color[:, mirror.owner]
    matt = shade_matt(mirror.normals, tint, ahead)
    shiny = shade_mirrored_metal(mirror.normals, tint, mirror.direction)
    mirrored = np.where(mirror.owner == GROUND, floor, np.where(bodies.metal[mirror.owner], shiny, matt))

    color = bodies.color[:, seen.owner]
    rubber = np.flatnonzero(~bodies.metal[seen.owner])
    metal = mirror.fragment
    radiance = np.empty_like(color)
    radiance[:, rubber] = shade_rubber(
        seen.normals[:, rubber],
        seen.view[:, rubber],
        color[:, rubber],
        seen.spread[rubber],
        lights.part(rubber),
    )
    radiance[:, metal] = shade_metal(
        seen.normals[:, metal],
        seen.view[:, metal],
        color[:, metal],
        seen.spread[metal],
        mirror.direction,
        mirrored,
        mirror.lost,
        lights.part(metal),
    )
    return seen.pixel, radiance * seen.coverage
