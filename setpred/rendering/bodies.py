"""The objects of all scenes of a batch in one list, for the stages of rendering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from setpred.rendering.scenes import SHAPES, SceneBatch
from setpred.rendering.shapes import HITS, MISS, NORMALS, REACH
from setpred.rendering.vectors import normalised, take

GROUND = -1  # in place of an object's number


@dataclass(frozen=True)
class Bodies:
    """The O objects of B scenes, ordered by shape, then scene, then slot.

    scene, slot: the object's place in the batch, int64 `[O]`; number: the inverse, int64 `[B, N]`, -1 in the padding;
    centre: `[3, O]`; half: half sizes `[O]`; cosine, sine: of the yaw `[O]`; color: linear RGB `[3, O]`; metal: bool
    `[O]`; shape: index into `SHAPES`, int64 `[O]`; reach: radius of a ball around the object `[O]`.
    """

    scene: Tensor
    slot: Tensor
    number: Tensor
    centre: Tensor
    half: Tensor
    cosine: Tensor
    sine: Tensor
    color: Tensor
    metal: Tensor
    shape: Tensor
    reach: Tensor

    @classmethod
    def of(cls, scenes: SceneBatch) -> Bodies:
        count, slots = scenes.present.shape
        shape = torch.where(scenes.present, scenes.shape, len(SHAPES)).flatten()
        place = torch.argsort(shape, stable=True)[: int(scenes.present.sum())]
        number = torch.full_like(shape, -1)
        number[place] = torch.arange(len(place), device=place.device)
        scene = torch.arange(count, device=place.device).repeat_interleave(slots)[place]
        half = scenes.half.flatten()[place]
        cosine, sine = scenes.yaw.reshape(-1, 2)[place].unbind(1)
        return cls(
            scene=scene,
            slot=place - scene * slots,
            number=number.reshape(count, slots),
            centre=scenes.centre.reshape(-1, 3)[place].T.contiguous(),
            half=half,
            cosine=cosine,
            sine=sine,
            color=scenes.color.reshape(-1, 3)[place].T.contiguous(),
            metal=scenes.metal.flatten()[place],
            shape=shape[place],
            reach=half * half.new_tensor(REACH)[shape[place]],
        )

    def __len__(self) -> int:
        return len(self.half)

    def others(self, scene: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each slot, the object there in each of the scenes `[n]`, and whether the slot is filled `[n]`."""
        for slot in range(self.number.shape[1] if len(self) else 0):
            others = take(self.number[:, slot], scene)
            yield others.clamp(min=0), others != GROUND

    def to_unit(self, owner: Tensor, vectors: Tensor) -> Tensor:
        """World vectors `[3, ..., n]`, relative to their owners' centres, in the unit coordinates of owners `[n]`."""
        half = take(self.half, owner)
        c, s = take(self.cosine, owner) / half, take(self.sine, owner) / half
        x, y, z = vectors
        return torch.stack([c * x + s * y, c * y - s * x, z / half])

    def hit(self, owner: Tensor, origin: Tensor, direction: Tensor) -> Tensor:
        """First t at which rays meet their owners `[n]`, in the owners' unit coordinates `[3, n]`: `[n]` or `MISS`."""
        t = torch.full_like(origin[0], MISS)
        shape = take(self.shape, owner)
        for index, hit in enumerate(HITS):
            which = (shape == index).nonzero().squeeze(1)
            t[which] = hit(take(origin, which), take(direction, which))
        return t

    def normals(self, owner: Tensor, points: Tensor) -> Tensor:
        """Outward unit normals `[3, ..., n]` of the owners `[n]` at points `[3, ..., n]` on their surfaces."""
        q = self.to_unit(owner, points - take(self.centre, owner).reshape(3, *[1] * (points.ndim - 2), len(owner)))
        shape = take(self.shape, owner)
        for index, normal in enumerate(NORMALS[1:], start=1):  # a sphere's normal is q itself
            which = (shape == index).nonzero().squeeze(1)
            q[..., which] = normal(take(q, which))
        x, y, z = normalised(q)
        c, s = take(self.cosine, owner), take(self.sine, owner)
        return torch.stack([c * x - s * y, s * x + c * y, z])
