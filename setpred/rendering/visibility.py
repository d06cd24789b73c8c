"""Ray casting: the object at each image point, the surface points to shade, and what metal mirrors. Exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import FOCAL
from setpred.rendering.ground import FAR, floor_height, ground_hit, ground_normal
from setpred.rendering.shapes import MISS
from setpred.rendering.vectors import added, dot, normalised, pixels_of, take

NUMBER_BITS = 31  # of a hit's key: the depth above, the object's number below


class View(NamedTuple):
    """B cameras and their image: location, right, up, backward `[3, B]`; size in pixels; focal lengths in pixels."""

    location: Tensor
    right: Tensor
    up: Tensor
    backward: Tensor
    width: int
    height: int
    focal: tuple[float, float]

    @classmethod
    def of(cls, locations: Tensor, width: int, height: int, aspect: float) -> View:
        """The view of cameras (see `camera.Camera`) at `locations [B, 3]`."""
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
        """Slopes of rays through image points in pixels; a ray is slope_x right + slope_y up - backward."""
        return (x - self.width / 2) / self.focal[0], (self.height / 2 - y) / self.focal[1]

    def centres(self) -> tuple[Tensor, Tensor]:
        """Slopes x `[width]` and y `[height]` of the pixel centres."""
        real = {"dtype": torch.float32, "device": self.location.device}
        return self.slopes(torch.arange(self.width, **real) + 0.5, torch.arange(self.height, **real) + 0.5)


def object_boxes(bodies: Bodies, view: View) -> Tensor:
    """Pixels (left, top, right, bottom) that may show each object: int64 `[O, 4]`."""
    side = bodies.half.new_tensor([-1.0, 1.0])
    x, y, z = torch.cartesian_prod(side, side, side).T[:, :, None] * bodies.half
    c, s = bodies.cosine, bodies.sine
    return view.boxes(torch.stack([c * x - s * y, s * x + c * y, z]) + bodies.centre[:, None], bodies.scene)


def find_visible(bodies: Bodies, view: View, *, samples: int) -> tuple[Tensor, Tensor]:
    """Find the nearest objects along S = samples^2 rays in each of the P pixels of B images.

    Returns the object's number or `GROUND`, int64 `[S, B * P]`, and the depth of its surface, `inf` on the ground
    `[S, B * P]`.
    """
    owner, x, y = pixels_of(object_boxes(bodies, view))
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
    # the objects' lowest points are at z = 0, below the floor by its height there
    foot = take(floor_height(bodies.centre) / bodies.half - 1, mine)
    found = ((t > 0) & torch.isfinite(t) & (start[2] + t * direction[2] > foot)).nonzero().squeeze(1)

    pixels = len(view.location[0]) * view.height * view.width
    pixel = (take(bodies.scene, owner) * view.height + y) * view.width + x
    place = (torch.arange(len(dx), device=x.device)[:, None] * pixels + pixel).flatten()
    depth, number = nearest(*(take(part, found) for part in (t, mine, place)), rays=len(dx) * pixels)
    return number.reshape(len(dx), pixels), depth.reshape(len(dx), pixels)


def nearest(t: Tensor, owner: Tensor, ray: Tensor, *, rays: int) -> tuple[Tensor, Tensor]:
    """The first hit of each ray: t or `MISS`, and the object or `GROUND`, each `[rays]`.

    `t` > 0, `owner` and `ray` `[k]` list all hits.
    """
    # Positive floats are ordered as their bits are: the least key is the nearest hit, and holds its owner.
    key = (t.view(torch.int32).long() << NUMBER_BITS) | owner
    nothing = torch.iinfo(torch.int64).max
    least = torch.full((rays,), nothing, device=t.device).scatter_reduce_(0, ray, key, "amin")
    hit = least != nothing
    first = torch.where(hit, (least >> NUMBER_BITS).int().view(torch.float32), MISS)
    return first, torch.where(hit, least & (2**NUMBER_BITS - 1), GROUND)


class Fragments(NamedTuple):
    """The objects' visible parts, one entry for each object in each pixel that shows it.

    pixel: flat pixel index in the batch `[n]`; owner: object `[n]`; coverage: share of the pixel `[n]`; points,
    normals: means over the visible part, in the world `[3, n]`; view: unit vectors towards the camera `[3, n]`;
    spread: of the normals inside the fragment, 1 - |mean|^2 `[n]`; counts: number of fragments that are the first,
    second, ... of their pixel, in the order of the entries.
    """

    pixel: Tensor
    owner: Tensor
    coverage: Tensor
    points: Tensor
    normals: Tensor
    view: Tensor
    spread: Tensor
    counts: list[int]


def gather_fragments(bodies: Bodies, view: View, visible: Tensor, depth: Tensor) -> Fragments:
    """Average each object's samples (see `find_visible`) inside each pixel into one fragment."""
    samples = len(visible)
    occupied = (visible != GROUND).any(0).nonzero().squeeze(1)
    owners = take(visible, occupied)
    new = owners != GROUND  # the first sample of its object in the pixel
    for later in range(1, samples):
        for earlier in range(later):
            new[later] &= owners[later] != owners[earlier]
    sample, place = new.nonzero(as_tuple=True)
    pixel, owner = take(occupied, place), owners[sample, place]
    mine = take(owners, place) == owner
    number = added(mine.float())
    weight = mine / number
    scene, x, y = take(bodies.scene, owner), pixel % view.width, pixel // view.width % view.height
    dx, dy = view.samples(round(samples**0.5))
    across, down = view.slopes(x + dx[:, None], y + dy[:, None])
    location, right, up, backward = (take(part, scene) for part in view[:4])
    rays = right[:, None] * across + (up[:, None] * down - backward[:, None])
    depth = torch.where(mine, take(depth, pixel), 0)
    surface = location[:, None] + depth * rays
    points = added((surface * weight).transpose(0, 1))
    normals = added((bodies.normals(owner, surface) * weight).transpose(0, 1))
    length = dot(normals, normals).sqrt() + 1e-12
    return Fragments(
        pixel=pixel,
        owner=owner,
        coverage=number / samples,
        points=points,
        normals=normals / length,
        view=normalised(location - points),
        spread=(1 - length * length).clamp(min=0),
        counts=new.sum(1).tolist(),
    )


def trace_mirror(bodies: Bodies, fragments: Fragments, metal: Tensor) -> tuple[Tensor, ...]:
    """Follow the mirror rays of the metal fragments `metal [m]` to the next surface.

    Returns the rays' directions `[3, m]`; points and normals of the surface `[3, m]`; the object there, or `GROUND`
    `[m]`; and whether the ray meets nothing, bool `[m]` (its point is finite and without meaning).
    """
    view, normals, origin = (take(part, metal) for part in (fragments.view, fragments.normals, fragments.points))
    direction = 2 * dot(view, normals) * normals - view
    t, owner = nearest_hit(bodies, origin, direction, take(fragments.owner, metal))
    lost = t >= FAR
    points = origin + torch.where(lost, 0, t) * direction
    facing = ground_normal(points)
    on_body = (owner != GROUND).nonzero().squeeze(1)
    facing[:, on_body] = bodies.normals(take(owner, on_body), take(points, on_body))
    return direction, points, facing, owner, lost


def nearest_hit(bodies: Bodies, origin: Tensor, direction: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """First hits of unit rays `[3, n]` from the surfaces of objects `leaving [n]`: t and the object, each `[n]`."""
    ray, other = [leaving[:0]], [leaving[:0]]
    for others, there in bodies.others(take(bodies.scene, leaving)):
        to_centre = take(bodies.centre, others) - origin
        along, reach = dot(to_centre, direction), take(bodies.reach, others)
        near = dot(to_centre, to_centre) - along * along < reach * reach
        ray.append((near & (along > 0) & (others != leaving) & there).nonzero().squeeze(1))
        other.append(take(others, ray[-1]))
    ray, other = torch.cat(ray), torch.cat(other)
    start = bodies.to_unit(other, take(origin, ray) - take(bodies.centre, other))
    t = bodies.hit(other, start, bodies.to_unit(other, take(direction, ray)))
    found = ((t > 0) & (t < FAR)).nonzero().squeeze(1)
    t, owner = nearest(*(take(part, found) for part in (t, other, ray)), rays=len(leaving))
    ground = ground_hit(origin, direction)
    return torch.minimum(t, ground), torch.where(t < ground, owner, GROUND)


def grain(bodies: Bodies, fragments: Fragments, which: Tensor) -> Tensor:
    """Direction of the brush marks on metal, around the object's upright axis in the surface: unit vectors `[3, m]`."""
    normals = take(fragments.normals, which)
    x, y, z = take(fragments.points, which) - take(bodies.centre, take(fragments.owner, which))
    around = torch.stack([-y, x, torch.zeros_like(z)])
    return normalised(around - dot(around, normals) * normals)
