"""How far the renderer's pictures are from those of another one, for scenes whose cameras and lamps are known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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

CLEARLY = 16  # grey levels by which a pixel differs from the ground where surely an object is seen


@dataclass(frozen=True)
class Comparison:
    """One picture of ours against one of theirs; grey levels of 0..255.

    rmse, rmse_objects: root of the mean squared difference, over all pixels and over those where we show an object
    (None where we show none); bias: mean difference, ours less theirs, of R, G and B; mask_agreement: of the pixels
    where their picture clearly differs from the ground with its shadows, the share in which one of 3x3 points is on an
    object of ours (None where there is none); pixel_error: largest difference of a projected object centre from its
    annotation, in pixels.
    """

    image: str
    rmse: float
    rmse_objects: float | None
    bias: list[float]
    mask_agreement: float | None
    pixel_error: float


def compare(
    root: str | os.PathLike[str], *, split: str = "val", first: int = 0, pictures: str | os.PathLike[str] | None = None
) -> Iterator[Comparison]:
    """Renders the scenes of a CLEVR folder that has a `cameras.jsonl` and compares them with its images, at their size.

    Images of another shape than 3:2 show CLEVR's view stretched, as those of `render_folder`, or more or less of the
    scene, as CLEVR's generator draws them: `pixel_coords` tell which.

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
        shown = annotate([scene], **size).instances[0].numpy() >= 0
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
            rmse_objects=float(np.sqrt(square[shown].mean())) if shown.any() else None,
            bias=(ours - theirs).mean(axis=(0, 1)).tolist(),
            mask_agreement=float(touched[found].mean()) if found.any() else None,
            pixel_error=errors[aspect],
        )


def _pixel_error(scene: Scene, record: dict, width: int, height: int, aspect: float) -> float:
    """Largest difference of a projected object centre from its annotation, in pixels."""
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
    """The scenes of a CLEVR folder, their records and their images `[height, width, 3]` as float64 grey levels."""
    folder = ClevrFolder(root, split)
    known = read_cameras(Path(root) / "cameras.jsonl", split=split)
    if first < 0:
        raise InputError(f"expected the number of a first image of at least 0, got {first}")
    if first >= len(folder):
        raise InputError(f"{root} has {len(folder)} images, none from number {first} on")
    records = json.loads((Path(root) / "scenes" / f"CLEVR_{split}_scenes.json").read_text())["scenes"]
    for number, record in enumerate(records[first:], start=first):
        index = record["image_index"]
        if index not in known:
            raise InputError(f"{root}: cameras.jsonl does not say where the camera of image {index} stood")
        yield (
            scene_of(record, *known[index]),
            record,
            np.asarray(read_image(folder.path(number)).convert("RGB")).astype(np.float64),
        )


def mean(comparisons: list[Comparison]) -> Comparison:
    """The means over images; `pixel_error` is the largest."""
    rows = [asdict(row) for row in comparisons]

    def average(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return float(np.mean(values)) if values else None

    return Comparison(
        image="mean",
        rmse=average("rmse"),
        rmse_objects=average("rmse_objects"),
        bias=np.mean([row["bias"] for row in rows], axis=0).tolist(),
        mask_agreement=average("mask_agreement"),
        pixel_error=max(row["pixel_error"] for row in rows),
    )


def table(comparison: Comparison) -> str:
    """One line of the table that `HEADER` heads."""
    objects, mask = (
        "      -" if value is None else f"{value:7.{digits}f}"
        for value, digits in ((comparison.rmse_objects, 2), (comparison.mask_agreement, 4))
    )
    bias = " ".join(f"{value:6.2f}" for value in comparison.bias)
    return f"{comparison.image:<24} {comparison.rmse:6.2f} {objects}  {bias}  {mask}  {comparison.pixel_error:6.3f}"


HEADER = f"{'image':<24} {'rmse':>6} {'objects':>7}  {'bias R':>6} {'G':>6} {'B':>6}  {'mask':>7}  {'pixel':>6}"
