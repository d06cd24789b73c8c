"""Surface points to shade: what each object shows in each pixel, and what metal mirrors there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.ground import FAR, ground_hit, ground_normal
from setpred.rendering.vectors import added, dot, normalised, take
from setpred.rendering.visibility import View, Visibility, nearest


@dataclass(frozen=True)
class Fragments:
    """The objects' visible parts, one entry for every object in every pixel where it shows.

    pixel: flat pixel index in the batch `[n]`; owner: object `[n]`; coverage: share of the pixel `[n]`.
    points, normals: world `[3, n]`, means over the visible part; view: unit vectors towards the camera `[3, n]`.
    spread: how much the normals differ inside the fragment, 1 - |mean|^2 `[n]`.
    counts: how many fragments are their pixel's first, second, ... one; they stand in this order.
    """

    pixel: Tensor
    owner: Tensor
    coverage: Tensor
    points: Tensor
    normals: Tensor
    view: Tensor
    spread: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Mirrored:
    """Where the mirror rays of metal fragments end.

    fragment: index of the fragment `[m]`; direction: of the ray `[3, m]`; points, normals: of what it meets `[3, m]`;
    owner: the object it meets, or `GROUND` `[m]`; lost: it meets nothing, bool `[m]` (points then mean nothing, but
    are finite).
    """

    fragment: Tensor
    direction: Tensor
    points: Tensor
    normals: Tensor
    owner: Tensor
    lost: Tensor


def gather_fragments(bodies: Bodies, view: View, visible: Visibility) -> Fragments:
    """Averages each object's samples inside each pixel into one fragment."""
    samples = len(visible.owner)
    occupied = (visible.owner != GROUND).any(0).nonzero().squeeze(1)
    owners = take(visible.owner, occupied)
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
    depth = torch.where(mine, take(visible.depth, pixel), 0)
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


def grain(bodies: Bodies, fragments: Fragments, which: Tensor) -> Tensor:
    """The direction of the brush marks on metal: around the object's upright axis, in the surface. Unit `[3, m]`."""
    normals = take(fragments.normals, which)
    x, y, z = take(fragments.points, which) - take(bodies.centre, take(fragments.owner, which))
    around = torch.stack([-y, x, torch.zeros_like(z)])
    return normalised(around - dot(around, normals) * normals)


def trace_mirror(bodies: Bodies, fragments: Fragments) -> Mirrored:
    """Follows the mirror rays of the metal fragments to the next surface."""
    fragment = take(bodies.metal, fragments.owner).nonzero().squeeze(1)
    view, normals, origin = (take(part, fragment) for part in (fragments.view, fragments.normals, fragments.points))
    direction = 2 * dot(view, normals) * normals - view
    mine = take(fragments.owner, fragment)
    t, owner = nearest_hit(bodies, origin, direction, mine)
    lost = t >= FAR
    points = origin + torch.where(lost, 0, t) * direction
    facing = ground_normal(points)
    on_body = (owner != GROUND).nonzero().squeeze(1)
    facing[:, on_body] = bodies.normals(take(owner, on_body), take(points, on_body))
    return Mirrored(fragment, direction, points, facing, owner, lost)


def nearest_hit(bodies: Bodies, origin: Tensor, direction: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """What rays `[3, n]` of unit length that leave the surfaces of objects `leaving [n]` meet: t and owner `[n]`."""
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
