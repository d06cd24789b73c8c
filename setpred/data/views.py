"""Scenes seen from several cameras: the images of a scene as one input set."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from setpred.data.dataset import VIEWS, Batch, SetFile
from setpred.data.hdf5 import InputSets, file_header
from setpred.errors import InputError, shown
from setpred.nn import POSE
from setpred.rendering.camera import ASPECT, FOCAL, Camera


def camera_pose(location: np.ndarray) -> np.ndarray:
    """The pose `[12]` of a camera at `location` that looks at the origin, as `setpred.encoders.ViewTokens` takes it."""
    right, up, backward = Camera(tuple(location)).axes()
    return np.concatenate([location, right / (2 * FOCAL), -up / (2 * FOCAL * ASPECT), -backward])


def view_inputs(views: int, image_size: int) -> InputSets:
    """Describe sets of `views` images of side `image_size` with their poses, which models take as they are."""
    dim = POSE + 3 * image_size**2
    return InputSets(views, views, (0.0,) * dim, (1.0,) * dim)


class SceneViews(SetFile):
    """A file of several images a scene, whose examples are scenes. The input set of a scene has an element per image:

        [pose of the camera, 12 numbers; pixels in [0, 1], row by row, red, green and blue]

    as `setpred.encoders.ViewTokens` takes them. With the attribute `mixed`, scene s of V views has only the first
    1 + s mod V present, so that a model learns to do with any number of them.

    Args:
        path: a file of `setpred.data.scenes.render_file` with `views`, or another with that entry in its source.
        images: only the first so many scenes.
        arguments: `set_size`, `schema` and `in_memory` of `SetFile`.

    Raises:
        InputError: a file without views, with an unknown camera, or whose images of a scene have different sets; what
            `SetFile` raises.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, images: int | None = None, instances: bool = False, **arguments: Any
    ) -> None:
        if instances:
            raise InputError("expected no masks of scenes from several cameras; leave --masks and data.masks out")
        header = file_header(path)
        views = header.source.get(VIEWS)
        if type(views) is not int or views < 1 or header.images % views or header.image_size is None:
            raise InputError(f"expected a file of images with views in its source, but {path} has {shown(views)}")
        self.mixed = False
        super().__init__(path, images=None if images is None else images * views, **arguments)
        self.inputs = view_inputs(views, header.image_size)
        sets = self._elements.reshape(-1, views, *self._elements.shape[1:])
        if not ((sets == sets[:, :1]).all() and np.isfinite(self._cameras).all()):
            raise InputError(f"{path}: expected one set for all images of a scene, and known cameras; make it again")
        self._poses = np.stack([camera_pose(place) for place in self._cameras]).reshape(-1, views, POSE).astype("f4")
        self._elements, self._counts, self._cameras = sets[:, 0], self._counts[::views], self._cameras[::views]
        self.image_index, self.image_size = self.image_index[::views] // views, None
        self._layout = [((views, *shape), kind) for shape, kind in self._layout]

    def name(self, index: int) -> str:
        return f"scene {self.image_index[index]}"

    def first_views(self, numbers: Sequence[int]) -> np.ndarray:
        """The first image of each of these scenes, uint8 `[n, S, S, 3]`, from the camera that `camera` gives."""
        return self._stored(np.asarray(numbers))[0][:, 0]

    def _stored(self, index: np.ndarray) -> list[np.ndarray]:
        (views, *shape), _ = self._layout[0]
        (images,) = super()._stored((index[:, None] * views + np.arange(views)).ravel())
        return [images.reshape(len(index), views, *shape)]

    def _batch_inputs(self, index: np.ndarray) -> Batch:
        (images,) = self._read(index)
        poses = torch.from_numpy(self._poses[index]).to(images.device)
        batch = {"input": torch.cat([poses, images.flatten(2) / 255], dim=-1)}
        if self.mixed:
            views = np.arange(self.inputs.most)
            present = torch.from_numpy(views <= self.image_index[index][:, None] % len(views))
            batch["input_mask"] = present.to(images.device)
        return batch
