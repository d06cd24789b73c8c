"""Comparison of the renderer's pictures with those of another one, for scenes whose cameras and lamps are known."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from setpred.data.clevr import ClevrFolder
from setpred.data.images import read_image
from setpred.errors import InputError
from setpred.files import make_folder, writing
from setpred.rendering.camera import ASPECT
from setpred.rendering.records import read_cameras, scene_of
from setpred.rendering.renderer import annotate, render, render_ground
from setpred.rendering.scenes import Scene

CLEARLY = 16  # grey levels by which a pixel differs from the ground where certainly an object is seen
HEADER = f"{'image':<24} {'rmse':>6} {'objects':>7}  {'bias R':>6} {'G':>6} {'B':>6}  {'mask':>7}  {'pixel':>6}"


class Comparison(NamedTuple):
    """One picture of ours against one of theirs, in grey levels of 0..255.

    rmse, rmse_objects: root mean squared difference, over all pixels and over those of our objects (None without any);
    bias: mean difference, ours minus theirs, of R, G and B; mask_agreement: of the pixels where their picture clearly
    differs from the ground with its shadows, the share in which one of 3x3 points is on an object of ours (None without
    any); pixel_error: largest distance of a projected object centre from its annotation along an axis, in pixels.
    """

    image: str
    rmse: float
    rmse_objects: float | None
    bias: list[float]
    mask_agreement: float | None
    pixel_error: float

    def line(self) -> str:
        """A line of the table that `HEADER` heads."""
        objects = "      -" if self.rmse_objects is None else f"{self.rmse_objects:7.2f}"
        mask = "      -" if self.mask_agreement is None else f"{self.mask_agreement:7.4f}"
        bias = " ".join(f"{value:6.2f}" for value in self.bias)
        return f"{self.image:<24} {self.rmse:6.2f} {objects}  {bias}  {mask}  {self.pixel_error:6.3f}"


def compare(
    root: str | os.PathLike[str], *, split: str = "val", first: int = 0, pictures: str | os.PathLike[str] | None = None
) -> Iterator[Comparison]:
    """Render the scenes of a CLEVR folder with a `cameras.jsonl`; compare them with its images, at their size.

    Images of another shape than 3:2 show CLEVR's view stretched, as those of `render_folder`, or more or less of the
    scene, as those of CLEVR's generator: `pixel_coords` tell which.

    Args:
        first: leave out the images before this one.
        pictures: a folder for pictures side by side: theirs, ours, four times the difference around grey.

    Raises:
        InputError: something is wrong with the folder, or the camera of an image is not known.
    """
    for scene, record, theirs in scenes_with_images(root, split=split, first=first):
        height, width, _ = theirs.shape
        errors = {aspect: _pixel_error(scene, record, width, height, aspect) for aspect in (ASPECT, width / height)}
        aspect = min(errors, key=errors.get)
        size = {"width": width, "height": height, "aspect": aspect}
        ours, ground = (make([scene], **size)[0].numpy().astype(np.float64) for make in (render, render_ground))
        on_object = annotate([scene], **size).instances[0].numpy() >= 0
        fine = annotate([scene], **size | {"width": 3 * width, "height": 3 * height}).instances[0].numpy() >= 0
        touched = fine.reshape(height, 3, width, 3).any(axis=(1, 3))
        square = ((ours - theirs) ** 2).mean(axis=-1)
        found = np.abs(theirs - ground).max(axis=-1) > CLEARLY
        if pictures is not None:
            side_by_side = np.concatenate([theirs, ours, np.clip(128 + 4 * (ours - theirs), 0, 255)], axis=1)
            path = (make_folder(pictures) / record["image_filename"]).with_suffix(".png")
            with writing(path):
                Image.fromarray(side_by_side.astype(np.uint8)).save(path)
        yield Comparison(
            image=record["image_filename"],
            rmse=float(np.sqrt(square.mean())),
            rmse_objects=float(np.sqrt(square[on_object].mean())) if on_object.any() else None,
            bias=(ours - theirs).mean(axis=(0, 1)).tolist(),
            mask_agreement=float(touched[found].mean()) if found.any() else None,
            pixel_error=errors[aspect],
        )


def _pixel_error(scene: Scene, record: dict, width: int, height: int, aspect: float) -> float:
    centres = np.array([obj.coords for obj in scene.objects]).reshape(-1, 3)
    try:
        annotated = np.array([obj["pixel_coords"][:2] for obj in record["objects"]], dtype=np.float64).reshape(-1, 2)
        apart = scene.camera.project(centres, width, height, aspect=aspect)[:, :2] - annotated
    except (KeyError, TypeError, ValueError) as error:
        name = record["image_filename"]
        raise InputError(f"{name}: expected 'pixel_coords' of every object, as in CLEVR_v1.0 ({error!r})") from error
    return float(np.abs(apart).max(initial=0))


def scenes_with_images(
    root: str | os.PathLike[str], *, split: str = "val", first: int = 0
) -> Iterator[tuple[Scene, dict, np.ndarray]]:
    """The scenes of a CLEVR folder, their records and their images float64 `[height, width, 3]` in grey levels."""
    folder = ClevrFolder(root, split)
    known = read_cameras(Path(root) / "cameras.jsonl", split=split)
    if not 0 <= first < len(folder):
        raise InputError(f"expected a first image of at least 0 and under {len(folder)}, got {first}")
    records = json.loads((Path(root) / "scenes" / f"CLEVR_{split}_scenes.json").read_text())["scenes"]
    for number, record in enumerate(records[first:], start=first):
        index = record["image_index"]
        if index not in known:
            raise InputError(f"{root}: cameras.jsonl does not have the camera of image {index}")
        yield scene_of(record, *known[index]), record, np.array(read_image(folder.path(number)).convert("RGB"), float)


def mean(comparisons: list[Comparison]) -> Comparison:
    """The means over images; `pixel_error` is the largest."""
    _, *columns, errors = zip(*comparisons, strict=True)
    known = ([value for value in column if value is not None] for column in columns)
    means = (np.mean(column, axis=0).tolist() if column else None for column in known)
    return Comparison("mean", *means, max(errors))
