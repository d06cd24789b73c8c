"""Scenes (objects, camera and lamps), and batches of scenes as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.rendering.camera import NOMINAL_CAMERA, Camera

HALF_SIZE = {"large": 0.7, "small": 0.35}
SHAPES = ("sphere", "cube", "cylinder")

# CLEVR's colours; 0..255 over 255 are linear values, not sRGB
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

NOMINAL_LAMPS = {
    "key": (6.446710109710693, -2.905174732208252, 4.258398056030273),
    "fill": (-4.671124458312988, -4.01359748840332, 3.0112245082855225),
    "back": (-1.168501377105713, 2.646024465560913, 5.815736770629883),
}


@dataclass(frozen=True)
class SceneObject:
    """An object; `coords` is its centre, at the height of its half size, and `rotation` the yaw in radians."""

    coords: tuple[float, float, float]
    rotation: float
    material: str
    color: str
    shape: str
    size: str

    def as_dict(self) -> dict[str, Any]:
        """Plain types, with the schema's field names and `rotation`."""
        return asdict(self)


@dataclass(frozen=True)
class Scene:
    """Objects, the camera, and the locations of the lamps `key`, `fill` and `back`."""

    objects: tuple[SceneObject, ...]
    camera: Camera = NOMINAL_CAMERA
    lamps: dict[str, tuple[float, float, float]] = field(default_factory=lambda: dict(NOMINAL_LAMPS))


class SceneBatch(NamedTuple):
    """B scenes of up to N objects as tensors, for data loaders and devices.

    present: bool `[B, N]`, False in the padding; centre: float32 `[B, N, 3]`, world units; half: half sizes `[B, N]`;
    yaw: cosine and sine of the rotation `[B, N, 2]`; color: linear RGB `[B, N, 3]`; metal: bool `[B, N]`;
    shape: int64 index into `SHAPES` `[B, N]`; camera: `[B, 3]`; lamps: key, fill, back `[B, 3, 3]`.
    """

    present: Tensor
    centre: Tensor
    half: Tensor
    yaw: Tensor
    color: Tensor
    metal: Tensor
    shape: Tensor
    camera: Tensor
    lamps: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], *, max_objects: int | None = None) -> SceneBatch:
        """Convert scenes to tensors on the CPU.

        Args:
            max_objects: number of objects to pad to; by default that of the largest scene.

        Raises:
            InputError: no scene, a scene of more than `max_objects`, an object with an unknown class, a missing lamp,
                a non-finite number, a camera straight above the origin.
        """
        if not scenes:
            raise InputError("expected at least one scene, got none")
        most = max(len(scene.objects) for scene in scenes)
        size = most if max_objects is None else max_objects
        if most > size:
            raise InputError(f"expected scenes of at most {size} objects, got one of {most}")
        try:
            lamps = [[scene.lamps[name] for name in NOMINAL_LAMPS] for scene in scenes]
        except KeyError as error:
            raise InputError(f"expected lamps {', '.join(NOMINAL_LAMPS)} in every scene, {error} is missing") from error
        count, real = len(scenes), torch.float32  # not torch's default type
        batch = cls(
            present=torch.zeros(count, size, dtype=torch.bool),
            centre=torch.zeros(count, size, 3, dtype=real),
            half=torch.ones(count, size, dtype=real),
            yaw=torch.zeros(count, size, 2, dtype=real),
            color=torch.zeros(count, size, 3, dtype=real),
            metal=torch.zeros(count, size, dtype=torch.bool),
            shape=torch.zeros(count, size, dtype=torch.int64),
            camera=torch.tensor([scene.camera.location for scene in scenes], dtype=real),
            lamps=torch.tensor(lamps, dtype=real),
        )
        for number, scene in enumerate(scenes):
            if not (present := len(scene.objects)):
                continue
            try:
                columns = [
                    (
                        obj.coords,
                        HALF_SIZE[obj.size],
                        (math.cos(obj.rotation), math.sin(obj.rotation)),
                        [part / 255 for part in COLORS[obj.color]],
                        {"rubber": False, "metal": True}[obj.material],
                        SHAPES.index(obj.shape),
                    )
                    for obj in scene.objects
                ]
            except (KeyError, ValueError) as error:
                raise InputError(f"scene {number}: expected objects of CLEVR's classes, got {error}") from error
            batch.present[number, :present] = True
            for tensor, column in zip(batch[1:7], zip(*columns, strict=True), strict=True):
                tensor[number, :present] = torch.tensor(column, dtype=tensor.dtype)
        for name, tensor in zip(cls._fields, batch, strict=True):
            if not (finite := tensor.isfinite().flatten(1).all(1)).all():
                raise InputError(f"scene {int(finite.int().argmin())}: expected finite numbers in {name}")
        if (above := (batch.camera[:, :2] == 0).all(1)).any():
            number = int(above.int().argmax())
            raise InputError(f"scene {number}: a camera straight above the origin has no level axis; move it")
        return batch

    def to(self, device: torch.device | str) -> SceneBatch:
        """Copy to a device."""
        ordered = torch.device(device).type == "cuda"  # other devices may read the numbers before they arrive
        return SceneBatch(*(part.to(device, non_blocking=ordered) for part in self))

    def part(self, which: slice | Tensor) -> SceneBatch:
        """Select scenes."""
        return SceneBatch(*(tensor[which] for tensor in self))
