"""The objects of a scene as arrays, for the stages of rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from setpred.rendering.scenes import COLORS, HALF_SIZE
from setpred.rendering.shapes import NORMAL

if TYPE_CHECKING:
    from setpred.rendering.scenes import SceneObject


SHAPES = tuple(NORMAL)


@dataclass(frozen=True)
class Bodies:
    """Objects as float32 arrays, in their order.

    centre `[3, objects]`; half (size) `[objects]`; cosine, sine of the yaw `[objects]`; color (linear) `[3, objects]`;
    metal, bool `[objects]`; shape, index into `SHAPES` `[objects]`.
    """

    centre: np.ndarray
    half: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray
    color: np.ndarray
    metal: np.ndarray
    shape: np.ndarray

    @classmethod
    def of(cls, objects: Sequence[SceneObject]) -> Bodies:
        yaw = np.array([obj.rotation for obj in objects], dtype=np.float64)
        return cls(
            centre=np.array([obj.coords for obj in objects], dtype=np.float32).reshape(-1, 3).T.copy(),
            half=np.array([HALF_SIZE[obj.size] for obj in objects], dtype=np.float32),
            cosine=np.cos(yaw).astype(np.float32),
            sine=np.sin(yaw).astype(np.float32),
            color=np.array([COLORS[obj.color] for obj in objects], dtype=np.float32).reshape(-1, 3).T / 255,
            metal=np.array([obj.material == "metal" for obj in objects], dtype=bool),
            shape=np.array([SHAPES.index(obj.shape) for obj in objects], dtype=np.intp),
        )

    def __len__(self) -> int:
        return len(self.half)

    def to_unit(self, owner: np.ndarray | int, vectors: np.ndarray) -> np.ndarray:
        """World vectors `[3, ..., n]` in the unit coordinates of their owners `[n]` (without the shift by `centre`)."""
        c, s, half = self.cosine[owner], self.sine[owner], self.half[owner]
        x, y, z = vectors
        c, s = c / half, s / half
        return np.stack([c * x + s * y, c * y - s * x, z / half])

    def normals(self, owner: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Outward unit normals `[3, ..., n]` of the owners `[n]` at points `[3, ..., n]` on their surfaces."""
        centre = self.centre[:, owner].reshape(3, *[1] * (points.ndim - 2), len(owner))
        q = self.to_unit(owner, points - centre)
        kind = self.shape[owner]
        for index, shape in enumerate(SHAPES):
            which = np.flatnonzero(kind == index)
            if which.size:
                q[..., which] = NORMAL[shape](q[..., which])
        q /= np.sqrt((q * q).sum(axis=0) + 1e-20)
        c, s = self.cosine[owner], self.sine[owner]
        return np.stack([c * q[0] - s * q[1], s * q[0] + c * q[1], q[2]])
