"""Render batches of scenes, on the CPU or a GPU.

Stages: `find_visible` casts rays at the objects; `gather_fragments` averages each object's samples in each pixel;
`trace_mirror` follows the mirror rays of metal; `lights_at` and `block` give the incoming light; the materials turn it
into radiance; `render` blends by coverage and encodes as sRGB. Geometry is exact, light approximate.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.rendering import materials, visibility
from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import ASPECT
from setpred.rendering.ground import ground_depth, ground_normal
from setpred.rendering.lighting import Lights, block, block_ground, lights_at
from setpred.rendering.scenes import Scene, SceneBatch
from setpred.rendering.vectors import pixels_of, take
from setpred.rendering.visibility import Fragments, View

TABLE_SIZE = 4096
CPU_PIXELS = 2**17  # rendered at a time on a CPU: many enough for torch, few enough for the caches


class Annotation(NamedTuple):
    """Ground truth at the pixel centres of images.

    instances: index of the visible object in its scene, -1 for the ground, int8 `[B, height, width]`; depth: of the
    surface along the camera's axis, world units `[B, height, width]`; visible_pixels: of each object, int64 `[B, N]`,
    0 in the padding.
    """

    instances: Tensor
    depth: Tensor
    visible_pixels: Tensor


@torch.no_grad()
def annotate(scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, aspect: float = ASPECT) -> Annotation:
    """Instance masks, depth and visible pixel counts of the images of scenes. Arguments and errors as for `render`."""
    batch = _checked(scenes, width, height, aspect)
    if (most := batch.present.shape[1]) > (limit := torch.iinfo(torch.int8).max + 1):
        raise InputError(f"expected scenes of at most {limit} objects (`instances` are int8), got {most}")
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    owner, depth = (part.reshape(-1, height, width) for part in visibility.find_visible(bodies, view, samples=1))
    ground = ground_depth(*view[:4], *view.centres())
    slots = torch.cat([bodies.slot, bodies.slot.new_full((1,), GROUND)])  # the last one for the ground
    counts = torch.zeros(len(bodies) + 1, dtype=torch.int64, device=owner.device)
    counts.scatter_add_(0, owner.flatten() % (len(bodies) + 1), torch.ones_like(owner.flatten()))
    visible_pixels = torch.where(bodies.number == GROUND, 0, counts[bodies.number])
    return Annotation(slots[owner].to(torch.int8), torch.where(owner == GROUND, ground, depth), visible_pixels)


@torch.no_grad()
def render(
    scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, samples: int = 2, aspect: float = ASPECT
) -> Tensor:
    """Render scenes as sRGB images, uint8 `[B, height, width, 3]`, on the device of the batch.

    On a CPU an image depends on its scene alone, not on the rest of the batch. It carries no gradients.

    Args:
        scenes: scenes, or their tensors on the device that renders.
        width, height: size of the images in pixels.
        samples: casts `samples` x `samples` rays in each pixel, to smooth edges.
        aspect: width over height of the view, stretched to the image (see `Camera`).

    Raises:
        InputError: no scenes, invalid scenes (see `SceneBatch.of`), not in float32, or a size, `samples` or `aspect`
            that is not positive.
    """
    if samples < 1:
        raise InputError(f"expected at least 1 sample, got {samples}")
    batch = _checked(scenes, width, height, aspect)
    size = max(1, CPU_PIXELS // (width * height)) if batch.camera.device.type == "cpu" else len(batch.camera)
    parts = (slice(start, start + size) for start in range(0, len(batch.camera), size))
    return torch.cat([_render(batch.part(part), width, height, samples, aspect) for part in parts])


def _render(batch: SceneBatch, width: int, height: int, samples: int, aspect: float) -> Tensor:
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    owner, depth = visibility.find_visible(bodies, view, samples=samples)
    image = ground_radiance(bodies, view, batch.lamps)
    image *= (owner == GROUND).float().mean(0)
    if len(bodies):
        seen = visibility.gather_fragments(bodies, view, owner, depth)
        radiance = object_radiance(bodies, seen, batch.lamps)
        # the pixels' first fragments, then their second ones, ...: no pixel twice at a time
        for at, light in zip(seen.pixel.split(seen.counts), radiance.split(seen.counts, dim=1), strict=True):
            image[:, at] += light
    return develop(image, view)


@torch.no_grad()
def render_ground(scenes: Sequence[Scene] | SceneBatch, *, width: int, height: int, aspect: float = ASPECT) -> Tensor:
    """Render the ground with the objects' shadows, without the objects. Arguments and errors as for `render`."""
    batch = _checked(scenes, width, height, aspect)
    bodies, view = Bodies.of(batch), View.of(batch.camera, width, height, aspect)
    return develop(ground_radiance(bodies, view, batch.lamps), view)


def _checked(scenes: Sequence[Scene] | SceneBatch, width: int, height: int, aspect: float) -> SceneBatch:
    if min(width, height) < 1 or not 0 < aspect < math.inf:
        raise InputError(f"expected a picture of at least 1x1 pixel and aspect > 0, got {width}x{height} and {aspect}")
    batch = scenes if isinstance(scenes, SceneBatch) else SceneBatch.of(scenes)
    if not len(batch.camera):
        raise InputError("expected at least one scene, got none")
    if (found := {tensor.dtype for tensor in batch if tensor.is_floating_point()}) != {torch.float32}:
        raise InputError(f"expected scenes in float32, got {', '.join(map(str, found))}; do not convert them")
    return batch


def ground_radiance(bodies: Bodies, view: View, lamps: Tensor) -> Tensor:
    """Linear RGB `[3, B * P]` of the ground behind every pixel, with shadows."""
    x, y = view.centres()
    depth = ground_depth(*view[:4], x, y)
    location, right, up, backward = (axis[..., None, None] for axis in view[:4])
    points = (location + depth * (right * x + (up * y[:, None] - backward))).flatten(1)
    lamps = lamps.permute(2, 1, 0)
    everywhere = lamps[..., None].expand(-1, -1, -1, view.width * view.height).flatten(2)
    lights = block_ground(lights_at(points, everywhere), points, bodies, view, lamps)
    image = materials.shade_ground(points, ground_normal(points), lights)

    low, high = visibility.object_boxes(bodies, view).split(2, dim=1)
    size, limits = high - low, torch.tensor([view.width, view.height], device=low.device)
    body, column, row = pixels_of(torch.cat([(low - size).clamp(min=0), torch.minimum(high + size, limits)], dim=1))
    pixel = (take(bodies.scene, body) * view.height + row) * view.width + column
    for channel, part in zip(image, materials.glow(take(points, pixel), body, bodies), strict=True):
        channel.scatter_add_(0, pixel, part)
    return image


def object_radiance(bodies: Bodies, seen: Fragments, lamps: Tensor) -> Tensor:
    """Linear RGB times coverage of fragments `[3, n]`."""
    is_metal = take(bodies.metal, seen.owner)
    metal, rubber = is_metal.nonzero().squeeze(1), (~is_metal).nonzero().squeeze(1)
    direction, ends, facing, met, lost = visibility.trace_mirror(bodies, seen, metal)
    points = torch.cat([seen.points, ends], dim=1)
    scene = take(bodies.scene, torch.cat([seen.owner, take(seen.owner, metal)]))
    lights = lights_at(points, take(lamps.permute(2, 1, 0), scene))
    lights = block(lights, points, torch.cat([seen.owner, met]), scene, bodies)
    count = len(seen.pixel)

    ahead = Lights(*(part[..., count:] for part in lights))
    on_ground, met = met == GROUND, met.clamp(min=0)
    tint = take(bodies.color, met)
    matt = materials.shade_matt(facing, tint, ahead)
    shiny = materials.shade_mirrored_metal(facing, tint, direction)
    floor = materials.shade_ground(ends, facing, ahead)
    for others, there in bodies.others(scene[count:]):
        floor = floor + torch.where(there, materials.glow(ends, others, bodies), 0)
    mirrored = torch.where(on_ground, floor, torch.where(take(bodies.metal, met), shiny, matt))

    color = take(bodies.color, seen.owner)
    radiance = torch.empty_like(color)
    surface = seen.normals, seen.view, color, seen.spread
    radiance[:, rubber] = materials.shade_rubber(*(take(part, rubber) for part in surface), lights.part(rubber))
    radiance[:, metal] = materials.shade_metal(
        *(take(part, metal) for part in surface),
        direction,
        mirrored,
        lost,
        lights.part(metal),
        visibility.grain(bodies, seen, metal),
    )
    return radiance * seen.coverage


def soften(image: Tensor) -> Tensor:
    """Filter `[3, B, height, width]` by 1/12, 10/12, 1/12 along both image axes: CLEVR's pixels overlap."""
    for axis in (2, 3):
        size = image.shape[axis]
        before = torch.cat([image.narrow(axis, 0, 1), image.narrow(axis, 0, size - 1)], dim=axis)
        after = torch.cat([image.narrow(axis, 1, size - 1), image.narrow(axis, size - 1, 1)], dim=axis)
        image = image * (10 / 12) + (before + after) / 12
    return image


def develop(image: Tensor, view: View) -> Tensor:
    """Linear RGB `[3, B * P]` to images, uint8 `[B, height, width, 3]`."""
    return encode(soften(image.clamp(0, 1).reshape(3, -1, view.height, view.width)))


@cache
def _srgb_table(device: torch.device) -> Tensor:
    """8-bit sRGB of the squares of evenly spaced numbers in [0, 1], which are densest where the curve is steep."""
    linear = torch.linspace(0, 1, TABLE_SIZE, dtype=torch.float64).square()
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().to(torch.uint8).to(device)


def encode(image: Tensor) -> Tensor:
    """Linear RGB `[3, B, height, width]` in [0, 1] to 8-bit sRGB `[B, height, width, 3]`."""
    index = (image.sqrt() * (TABLE_SIZE - 1) + 0.5).int()
    return _srgb_table(image.device)[index.permute(1, 2, 3, 0)].contiguous()
