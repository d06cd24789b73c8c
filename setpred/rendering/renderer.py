"""Pictures of scenes, many at once, on the CPU or a GPU.

The stages can be read one by one: `find_visible` casts rays at the objects; `gather_fragments` makes one point to
shade of every object in every pixel; `trace_mirror` finds what metal reflects; `lights_at` and `block` give the light
that arrives; the materials turn it into radiance; `render` blends by coverage and encodes as sRGB. Geometry is exact,
light is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import ASPECT
from setpred.rendering.fragments import gather_fragments, grain, trace_mirror
from setpred.rendering.ground import ground_depth, ground_normal
from setpred.rendering.lighting import Lights, block, block_ground, lights_at
from setpred.rendering.materials import (
    glow,
    shade_ground,
    shade_matt,
    shade_metal,
    shade_mirrored_metal,
    shade_rubber,
)
from setpred.rendering.scenes import Scene, SceneBatch
from setpred.rendering.vectors import pixels_of, take
from setpred.rendering.visibility import View, Visibility, find_visible

TABLE_SIZE = 4096
CPU_PIXELS = 2**17  # rendered at a time on a CPU: enough to keep torch busy, few enough for the caches


class Annotation(NamedTuple):
    """The truth about pictures, at the pixel centres.

    instances: place in its scene of the object that is seen, -1 for the ground, int8 `[B, height, width]`; depth: of
    the surface along the camera's axis, world units `[B, height, width]`; visible_pixels: of each object, int64
    `[B, N]`, 0 in the padding.
    """

    instances: Tensor
    depth: Tensor
    visible_pixels: Tensor


@torch.no_grad()
def annotate(scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, aspect: float = ASPECT) -> Annotation:
    """Masks, depth and visible pixel counts of the pictures of scenes. Arguments as for `render`."""
    batch = _checked(scenes, width, height, aspect)
    if (most := batch.present.shape[1]) > (limit := torch.iinfo(torch.int8).max + 1):
        raise InputError(f"expected scenes of at most {limit} objects, the most that `instances` can tell, got {most}")
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    visible = find_visible(bodies, view, samples=1)
    shape = len(batch.camera), height, width
    owner, depth = visible.owner[0].reshape(shape), visible.depth[0].reshape(shape)
    ground = ground_depth(view.location, view.right, view.up, view.backward, *_centres(view))
    slots = torch.cat([bodies.slot, bodies.slot.new_full((1,), GROUND)])  # the last one for the ground
    counts = torch.zeros(len(bodies) + 1, dtype=torch.int64, device=owner.device)
    counts.scatter_add_(0, owner.flatten() % (len(bodies) + 1), torch.ones_like(owner.flatten()))
    visible_pixels = torch.where(bodies.number == GROUND, 0, counts[bodies.number])
    return Annotation(slots[owner].to(torch.int8), torch.where(owner == GROUND, ground, depth), visible_pixels)


@torch.no_grad()
def render(
    scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, samples: int = 2, aspect: float = ASPECT
) -> Tensor:
    """The pictures of scenes: uint8 `[B, height, width, 3]`, sRGB, on the device of the batch.

    On a CPU a picture depends on its scene alone, whatever else is in the batch. No gradients pass through it.

    Args:
        scenes: scenes, or their tensors on the device that is to render.
        width, height: of the pictures in pixels.
        samples: edges are smoothed with `samples` x `samples` rays in each pixel.
        aspect: the view's width over its height, stretched to the picture (see `Camera`).

    Raises:
        InputError: no scenes, scenes that are not as `SceneBatch` says, or a size that is none.
    """
    if samples < 1:
        raise InputError(f"expected at least 1 sample, got {samples}")
    batch = _checked(scenes, width, height, aspect)
    size = max(1, CPU_PIXELS // (width * height)) if batch.camera.device.type == "cpu" else len(batch.camera)
    parts = (slice(start, start + size) for start in range(0, len(batch.camera), size))
    return torch.cat([_render(batch.part(part), width, height, samples, aspect) for part in parts])


def _render(batch: SceneBatch, width: int, height: int, samples: int, aspect: float) -> Tensor:
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    visible = find_visible(bodies, view, samples=samples)
    image = ground_radiance(bodies, view, batch.lamps, visible)
    image *= (visible.owner == GROUND).float().mean(0)
    if len(bodies):
        start = 0
        pixel, radiance, counts = object_radiance(bodies, view, batch.lamps, visible)
        for count in counts:  # the pixels' first fragments, then their second ones, ...: no pixel twice at a time
            part = slice(start, start + count)
            image[:, pixel[part]] += radiance[:, part]
            start += count
    return encode(soften(image.clamp(0, 1).reshape(3, len(batch.camera), height, width)))


@torch.no_grad()
def render_ground(scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, aspect: float = ASPECT) -> Tensor:
    """The pictures that `render` makes, without the objects but with their shadows: the ground behind them."""
    batch = _checked(scenes, width, height, aspect)
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    image = ground_radiance(bodies, view, batch.lamps, find_visible(bodies, view, samples=1))
    return encode(soften(image.clamp(0, 1).reshape(3, len(batch.camera), height, width)))


def _checked(scenes: Sequence[Scene] | SceneBatch, width: int, height: int, aspect: float) -> SceneBatch:
    if min(width, height) < 1 or not 0 < aspect < math.inf:
        raise InputError(f"expected a picture of at least 1x1 pixel and aspect > 0, got {width}x{height} and {aspect}")
    batch = scenes if isinstance(scenes, SceneBatch) else SceneBatch.of(scenes)
    if not len(batch.camera):
        raise InputError("expected at least one scene, got none")
    if (found := {tensor.dtype for tensor in batch if tensor.is_floating_point()}) != {torch.float32}:
        raise InputError(f"expected scenes in float32, got {', '.join(map(str, found))}; leave them as they were made")
    return batch


def _centres(view: View) -> tuple[Tensor, Tensor]:
    """Ray slopes x `[width]` and y `[height]` of the pixel centres."""
    device = view.location.device
    x, y = (torch.arange(size, dtype=torch.float32, device=device) + 0.5 for size in (view.width, view.height))
    return view.slopes(x, y)


def ground_radiance(bodies: Bodies, view: View, lamps: Tensor, visible: Visibility) -> Tensor:
    """Linear RGB `[3, B * P]` of the ground behind every pixel, shadows included."""
    x, y = _centres(view)
    depth = ground_depth(view.location, view.right, view.up, view.backward, x, y)
    location, right, up, backward = (axis[..., None, None] for axis in view[:4])
    points = (location + depth * (right * x + (up * y[:, None] - backward))).flatten(1)
    lamps = lamps.permute(2, 1, 0)
    everywhere = lamps[..., None].expand(-1, -1, -1, view.width * view.height).flatten(2)
    lights = block_ground(lights_at(points, everywhere), points, bodies, view, lamps)
    image = shade_ground(points, ground_normal(points), lights)

    left, top, right, bottom = visible.boxes.unbind(1)
    aside, down = right - left, bottom - top
    limits = torch.tensor([view.width, view.height], device=left.device)
    low = torch.stack([left - aside, top - down], dim=1).clamp(min=0)
    high = torch.minimum(torch.stack([right + aside, bottom + down], dim=1), limits)
    body, column, row = pixels_of(torch.cat([low, high], dim=1))
    pixel = (take(bodies.scene, body) * view.height + row) * view.width + column
    for channel, part in zip(image, glow(take(points, pixel), body, bodies), strict=True):
        channel.scatter_add_(0, pixel, part)
    return image


def object_radiance(bodies: Bodies, view: View, lamps: Tensor, visible: Visibility) -> tuple[Tensor, Tensor, list[int]]:
    """Flat pixel indices `[n]`, what objects add there, linear RGB times coverage `[3, n]`, and `Fragments.counts`."""
    seen = gather_fragments(bodies, view, visible)
    mirror = trace_mirror(bodies, seen)
    metal = mirror.fragment
    points = torch.cat([seen.points, mirror.points], dim=1)
    scene = take(bodies.scene, torch.cat([seen.owner, take(seen.owner, metal)]))
    lights = lights_at(points, take(lamps.permute(2, 1, 0), scene))
    lights = block(lights, points, torch.cat([seen.owner, mirror.owner]), scene, bodies)
    count = len(seen.pixel)

    ahead = Lights(*(part[..., count:] for part in lights))
    met = mirror.owner.clamp(min=0)
    tint = take(bodies.color, met)
    matt = shade_matt(mirror.normals, tint, ahead)
    shiny = shade_mirrored_metal(mirror.normals, tint, mirror.direction)
    floor = shade_ground(mirror.points, mirror.normals, ahead)
    for others, there in bodies.others(scene[count:]):
        floor = floor + torch.where(there, glow(mirror.points, others, bodies), 0)
    body = torch.where(take(bodies.metal, met), shiny, matt)
    mirrored = torch.where(mirror.owner == GROUND, floor, body)

    color = take(bodies.color, seen.owner)
    rubber = (~take(bodies.metal, seen.owner)).nonzero().squeeze(1)
    radiance = torch.empty_like(color)
    radiance[:, rubber] = shade_rubber(
        *(take(part, rubber) for part in (seen.normals, seen.view, color, seen.spread)), lights.part(rubber)
    )
    radiance[:, metal] = shade_metal(
        *(take(part, metal) for part in (seen.normals, seen.view, color, seen.spread)),
        mirror.direction,
        mirrored,
        mirror.lost,
        lights.part(metal),
        grain(bodies, seen, metal),
    )
    return seen.pixel, radiance * seen.coverage, seen.counts


def soften(image: Tensor) -> Tensor:
    """Weights 1, 10, 1 over twelve along both image axes of `[3, B, height, width]`: CLEVR's pixels overlap."""
    for axis in (2, 3):
        size = image.shape[axis]
        before = torch.cat([image.narrow(axis, 0, 1), image.narrow(axis, 0, size - 1)], dim=axis)
        after = torch.cat([image.narrow(axis, 1, size - 1), image.narrow(axis, size - 1, 1)], dim=axis)
        image = image * (10 / 12) + (before + after) / 12
    return image


@cache
def _srgb_table(device: torch.device) -> Tensor:
    """8-bit sRGB of the squares of evenly spaced numbers in [0, 1]: fine steps where the curve is steep."""
    linear = torch.linspace(0, 1, TABLE_SIZE, dtype=torch.float64).square()
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().to(torch.uint8).to(device)


def encode(image: Tensor) -> Tensor:
    """Linear RGB `[3, B, height, width]` in [0, 1] to 8-bit sRGB `[B, height, width, 3]`."""
    index = (image.sqrt() * (TABLE_SIZE - 1) + 0.5).int()
    return _srgb_table(image.device)[index.permute(1, 2, 3, 0)].contiguous()
