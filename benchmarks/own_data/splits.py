"""Folders of images with a table of objects, their prepared files, and the scores of predicted objects."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from setpred.data.dataset import SetFile
from setpred.data.hdf5 import file_header
from setpred.evaluation import Predictions, report

Objects = list[dict[str, Any]]  # of an image: values by column, or by field and with a "confidence"
TABLE = "objects.csv"


def write_split(folder: Path, pictures: Iterable[tuple[Image.Image, Objects]]) -> None:
    """Write images as 00000.png, ... and their objects as one table, as an annotation tool would."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, objects) in enumerate(pictures):
        name = f"{number:05d}.png"
        image.save(folder / name)
        rows += [{"image": name} | values for values in objects]
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table_of(folder: Path, split: str) -> tuple[str | Path, ...]:
    """The options of `setpred data import` for the images and the table of a split."""
    return "--csv", folder / split / TABLE, "--images", folder / split


def images_of(folder: Path, split: str) -> list[np.ndarray]:
    """The images of a split, in the order of its prepared file."""
    return [np.asarray(Image.open(path)) for path in sorted((folder / split).glob("*.png"))]


def objects_of(folder: Path, split: str) -> list[Objects]:
    """The objects of each image, by field."""
    data = SetFile(folder / f"{split}.h5")
    return [data.schema.decode(elements) for elements in data.__getitems__(range(len(data)))["elements"]]


def scores(
    folder: Path, split: str, found: Sequence[Objects], thresholds: Sequence[float] = (), images: int | None = None
) -> dict[str, Any]:
    """Score objects found without the library in the first `images` examples, by the report of `setpred evaluate`."""
    data = SetFile(folder / f"{split}.h5", schema=file_header(folder / "train.h5").schema, images=images)
    target = data.__getitems__(range(len(data)))["elements"]
    most = max(1, *map(len, found))
    predicted = np.stack([data.schema.encode(objects, most) for objects in found])
    for elements, objects in zip(predicted, found, strict=True):
        elements[: len(objects), -1] = [values["confidence"] for values in objects]
    predictions = Predictions(torch.from_numpy(predicted), target, torch.arange(len(target)))
    return report(predictions, data.schema, "dataset", thresholds)
