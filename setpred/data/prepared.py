"""Files of a CLEVR folder's images, decoded and resized once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import __version__ as pillow_version

from setpred.data.cache import Header, Record
from setpred.data.clevr import ClevrFolder, load_image, locate_camera
from setpred.data.workers import ordered_map
from setpred.data.writer import write_set_file
from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema


class _Task(NamedTuple):
    path: Path
    elements: np.ndarray
    centres: np.ndarray
    pixels: np.ndarray
    index: int


def prepare_file(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    split: str,
    image_size: int,
    images: int | None = None,
    schema: ElementSchema = CLEVR,
    workers: int = 0,
    force: bool = False,
) -> str:
    """Decodes and resizes a split of a CLEVR_v1.0 folder into a file of `setpred.data.cache`'s format.

    Args:
        images: only so many, the first ones.
        workers: processes to decode in; 0 decodes in this one.

    Returns:
        The SHA-256 of the content.
    """
    if image_size < 8:
        raise InputError(f"expected images of at least 8x8 pixels, got {image_size}x{image_size}")
    folder = ClevrFolder(root, split, schema=schema, images=images)

    def records(start: int) -> Iterator[Record]:
        arrays = folder.elements, folder.centres, folder.pixels, folder.index
        tasks = (_Task(folder.path(i), *(array[i] for array in arrays)) for i in range(start, len(folder)))
        one = partial(_prepare, image_size=image_size, pixel_size=folder.pixel_size)
        return ordered_map(one, tasks, workers=workers)

    return write_set_file(
        path,
        Header(len(folder), image_size, schema, folder.source),
        records,
        producer=f"pillow {pillow_version}",
        description=f"preparing {image_size}x{image_size}",
        force=force,
    )


def _prepare(task: _Task, *, image_size: int, pixel_size: tuple[int, int]) -> Record:
    image = load_image(task.path, image_size)
    camera = locate_camera(task.centres, task.pixels, pixel_size)
    return Record(image, task.elements, camera, int(task.index))
