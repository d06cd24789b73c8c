"""Which object is seen where: rays through a grid of image points, the nearest hit of each. Exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import FOCAL
from setpred.rendering.ground import floor_height
from setpred.rendering.shapes import MISS
from setpred.rendering.vectors import dot, normalised, pixels_of, take

NUMBER_BITS = 31  # of a hit's key: the depth above, the object's number below


class View(NamedTuple):
    """B cameras and their common image: location, right, up, backward `[3, B]`; pixels; focal lengths in pixels."""

    location: Tensor
    right: Tensor
    up: Tensor
    backward: Tensor
    width: int
    height: int
    focal: tuple[float, float]

    @classmethod
    def of(cls, locations: Tensor, width: int, height: int, aspect: float) -> View:
        """Cameras at `locations [B, 3]` that look at the origin, as `camera.Camera` says."""
        location = locations.T.contiguous()
        backward = normalised(location)
        x, y, z = backward
        flat = (x * x + y * y).sqrt()
        right = torch.stack([-y / flat, x / flat, torch.zeros_like(z)])
        up = torch.stack([-x * z / flat, -y * z / flat, flat])
        return cls(location, right, up, backward, width, height, (FOCAL * width, FOCAL * aspect * height))

    def boxes(self, points: Tensor, scene: Tensor) -> Tensor:
        """Pixels (left, top, right, bottom) around the convex hulls of points `[3, k, n]`: int64 `[n, 4]`."""
        local = points - take(self.location, scene)[:, None]
        depth = -dot(local, take(self.backward, scene)[:, None])
        limits = (self.width, self.height)
        low, high = [], []
        for axis, focal, limit in zip((self.right, -self.up), self.focal, limits, strict=True):
            at = limit / 2 + focal * dot(local, take(axis, scene)[:, None]) / depth
            low.append(at.amin(0).floor().clamp(0, limit))
            high.append(at.amax(0).ceil().clamp(0, limit))
        box = torch.stack([*low, *high], dim=1).long()
        whole = torch.tensor([0, 0, *limits], device=box.device)
        return torch.where((depth.amin(0) < 0.1)[:, None], whole, box)  # a hull behind the camera has no finite box

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Offsets x, y `[count^2]` of a regular grid inside a pixel."""
        inside = (torch.arange(count, dtype=torch.float32, device=self.location.device) + 0.5) / count
        return inside.repeat(count), inside.repeat_interleave(count)

    def slopes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Image points in pixels to ray slopes: the ray is slope_x right + slope_y up - backward."""
        return (x - self.width / 2) / self.focal[0], (self.height / 2 - y) / self.focal[1]


@dataclass(frozen=True)
class Visibility:
    """Nearest objects along S = samples^2 rays in each of the P pixels of B images.

    owner: number of the object or `GROUND`, int64 `[S, B * P]`; depth: of the object's surface, `inf` on the ground
    `[S, B * P]`; boxes: the pixels that may show each object, int64 `[O, 4]`.
    """

    owner: Tensor
    depth: Tensor
    boxes: Tensor


def find_visible(bodies: Bodies, view: View, *, samples: int) -> Visibility:
    """Casts the rays of all images at the objects, each object only inside its projected bounding box."""
    boxes = view.boxes(_corners(bodies), bodies.scene)
    owner, x, y = pixels_of(boxes)
    every = torch.arange(len(bodies), device=owner.device)
    origin = bodies.to_unit(every, take(view.location, bodies.scene) - bodies.centre)
    right, up, backward = (bodies.to_unit(every, take(axis, bodies.scene)) for axis in view[1:4])
    dx, dy = view.samples(samples)
    across, down = view.slopes(x + dx[:, None], y + dy[:, None])
    right, up, backward, start = (take(part, owner)[:, None] for part in (right, up, backward, origin))
    direction = (right * across + (up * down - backward)).flatten(1)
    start = start.expand(-1, len(dx), -1).flatten(1)
    mine = owner.repeat(len(dx))
    t = bodies.hit(mine, start, direction)
    # objects stand on z = 0, sunk into the floor by its height there
    foot = take(floor_height(bodies.centre) / bodies.half - 1, mine)
    found = ((t > 0) & torch.isfinite(t) & (start[2] + t * direction[2] > foot)).nonzero().squeeze(1)

    pixels = len(view.location[0]) * view.height * view.width
    pixel = (take(bodies.scene, owner) * view.height + y) * view.width + x
    place = (torch.arange(len(dx), device=x.device)[:, None] * pixels + pixel).flatten()
    depth, number = nearest(*(take(part, found) for part in (t, mine, place)), rays=len(dx) * pixels)
    return Visibility(number.reshape(len(dx), pixels), depth.reshape(len(dx), pixels), boxes)


def nearest(t: Tensor, owner: Tensor, ray: Tensor, *, rays: int) -> tuple[Tensor, Tensor]:
    """The first of the hits at t > 0 on objects `owner` by each ray: t or `MISS`, and owner or `GROUND`, `[rays]`.

    `t`, `owner` and `ray` are `[k]`, one entry a hit.
    """
    # Positive floats are ordered as their bits are: the least key is the nearest hit, and says whose it is.
    key = (t.view(torch.int32).long() << NUMBER_BITS) | owner
    nothing = torch.iinfo(torch.int64).max
    least = torch.full((rays,), nothing, device=t.device).scatter_reduce_(0, ray, key, "amin")
    hit = least != nothing
    first = torch.where(hit, (least >> NUMBER_BITS).int().view(torch.float32), MISS)
    return first, torch.where(hit, least & (2**NUMBER_BITS - 1), GROUND)


def _corners(bodies: Bodies) -> Tensor:
    """The corners of the objects' bounding boxes: `[3, 8, O]`."""
    side = bodies.half.new_tensor([-1.0, 1.0])
    x, y, z = torch.cartesian_prod(side, side, side).T[:, :, None] * bodies.half
    c, s = bodies.cosine, bodies.sine
    return torch.stack([c * x - s * y, s * x + c * y, z]) + bodies.centre[:, None]
