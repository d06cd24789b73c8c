"""Points with normals on parametric solids, turned at random; the class is the target."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError

KINDS = ("ellipsoid", "box", "cylinder", "double cone", "torus", "right screw", "left screw")
TUBE = 0.3  # radius of the tube of torus and screws, whose axis has a radius of 1


def surface(kind: int, u: np.ndarray, v: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Points `[..., 3]` of the surface at parameters u and v from 0 to 1, for half sizes `[..., 3]`.

    The first four are superellipsoids, (|x|^(2/b) + |y|^(2/b))^(b/a) + |z|^(2/a) = 1 (Barr, 1981). A screw is a tube
    around a turn of a helix about z; the left one is the mirror image of the right one.
    """
    around, across = 2 * np.pi * u, 2 * np.pi * v
    if kind < 4:
        a, b = ((1, 1), (0.1, 0.1), (0.1, 1), (2, 1))[kind]
        polar = np.pi * (v - 0.5)
        ray = np.stack([np.cos(polar) * np.cos(around), np.cos(polar) * np.sin(around), np.sin(polar)], axis=-1)
        ring = (np.abs(ray[..., :2]) ** (2 / b)).sum(-1) ** (b / 2)
        shape = ray / ((ring ** (2 / a) + np.abs(ray[..., 2]) ** (2 / a)) ** (a / 2))[..., None]
    else:
        hand, pitch = ((1, 0), (1, 2), (-1, 2))[kind - 4]
        ring = 1 + TUBE * np.cos(across)
        shape = [ring * np.cos(around), hand * ring * np.sin(around), pitch * (u - 0.5) + TUBE * np.sin(across)]
        shape = np.stack(shape, axis=-1)
    return shape * size


class Solids(World):
    """Solids as sets of surface points [x, y, z, normal], in any orientation; the target is the class, one of `KINDS`.

    Trained on upright and tested on turned solids, a model has to be invariant by construction, and to know the two
    screws apart it must not be blind to mirror images. Half sizes along x, y and z are uniform from 0.6 to 1, so the
    proportions vary within a class; points are drawn uniformly by area and moved by normal noise of deviation 0.01.
    Rotations are uniform. Normals are of length 1 and point outwards. The target is one-hot, a set of one element.

    Args:
        points: points of a set.
        train_rotated, val_rotated: whether the solids of that part are turned.
        arguments: those of `World`.
    """

    def __init__(
        self, *, points: int = 96, train_rotated: bool = False, val_rotated: bool = True, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        if points < 1:
            raise InputError(f"expected at least 1 point of a solid, got {points}")
        self.points = points
        self.rotated = {"train": train_rotated, "val": val_rotated}

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        kinds = rng.permutation(np.arange(count) % len(KINDS))
        elements = np.zeros((count, self.points, 6))
        for kind in range(len(KINDS)):
            elements[kinds == kind] = self._upright(kind, int((kinds == kind).sum()), rng)
        if self.rotated[split]:
            turns = np.linalg.qr(rng.normal(size=(count, 3, 3)))
            # with positive diagonals of R, Q is uniform in O(3)
            turns = turns.Q * np.sign(np.diagonal(turns.R, axis1=1, axis2=2))[:, None]
            turns[:, :, 0] *= np.linalg.det(turns)[:, None]
            elements = np.concatenate([elements[..., :3] @ turns, elements[..., 3:] @ turns], axis=-1)
        target = np.eye(len(KINDS), dtype=np.float32)[kinds][:, None]
        return {"input": elements.astype(np.float32), "elements": target}

    def _upright(self, kind: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` sets of one kind, `[count, points, 6]`."""
        size = rng.uniform(0.6, 1.0, (count, 1, 3))
        u, v = rng.uniform(size=(2, count, 4 * self.points))
        step = 1e-4
        along_u, along_v = (
            surface(kind, u + up, v + across, size) - surface(kind, u - up, v - across, size)
            for up, across in ((step, 0), (0, step))
        )
        normals = np.cross(along_u, along_v)
        area = np.linalg.norm(normals, axis=-1)
        # the largest of log(area) + Gumbel noise: drawn without replacement, with probability by area
        noise = rng.gumbel(size=area.shape)
        chosen = np.argsort(-(np.log(np.maximum(area, 1e-300)) + noise), axis=1)[:, : self.points, None]
        points = np.take_along_axis(surface(kind, u, v, size), chosen, axis=1)
        normals = np.take_along_axis(normals / np.maximum(area, 1e-300)[..., None], chosen, axis=1)
        if kind == 6:
            normals = -normals  # the mirror image reverses the order of u and v
        return np.concatenate([points + rng.normal(scale=0.01, size=points.shape), normals], axis=-1)
