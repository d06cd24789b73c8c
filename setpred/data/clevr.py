"""Read the CLEVR data set, and prepare it as one HDF5 file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import __version__ as pillow_version

from setpred.data.hdf5 import Header, Record
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import PIXEL_SIZE, load_image, pixel_size
from setpred.data.workers import ordered_map
from setpred.errors import InputError, shown
from setpred.files import LARGEST_NUMBER, require_regular, unique_keys
from setpred.rendering.camera import fit_camera
from setpred.schema import CLEVR, ElementSchema

MOST_BYTES = 2**29  # of a file of scenes; the largest of CLEVR v1.0, for 70,000 images, has some hundred million
MOST_RECORDS = 10_000  # between one scene and the next, its objects among them: they are in memory all at once


class _Scene(NamedTuple):
    file_name: str
    index: int
    elements: np.ndarray
    centres: np.ndarray
    pixels: np.ndarray


class ClevrFolder:
    """One split of a folder in the CLEVR_v1.0 layout; the annotations are arrays.

    Attributes:
        elements: float32 `[n, schema.max_objects, schema.set_dim]`, encoded by the schema, zero padded.
        index: int64 `[n]`, CLEVR's `image_index`.
        centres, pixels: float64 `[n, schema.max_objects, 3]`, `3d_coords` and `pixel_coords`, NaN where padded.
        source: where this comes from, in plain types.
        pixel_size: width and height of the first image, in which `pixel_coords` count.

    Raises:
        InputError: whatever is wrong with the folder, naming the file, image and object.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, schema: ElementSchema = CLEVR, images: int | None = None
    ) -> None:
        self.root, self.split, self.schema = Path(root), split, schema
        if images is not None and images < 1:
            raise InputError(f"expected at least 1 image, got {images}")
        scenes_file = _scenes_file(self.root, split)
        self.folder = self.root / "images" / split
        if scenes_file.parent == self.root:  # as clevr-dataset-gen leaves them
            self.folder = self.root / "images"
        content = _read(scenes_file)
        scenes = self._parse(content, scenes_file)[:images]
        self.file_names = [scene.file_name for scene in scenes]
        self.elements = np.stack([scene.elements for scene in scenes])
        self.index = np.array([scene.index for scene in scenes], dtype=np.int64)
        self.centres = np.stack([scene.centres for scene in scenes])
        self.pixels = np.stack([scene.pixels for scene in scenes])
        self.source = {
            "kind": "clevr",
            "folder": self.root.resolve().name,
            "split": split,
            "scenes_sha256": sha256(content).hexdigest(),
        }
        self._check_images()
        self.pixel_size = pixel_size(self.path(0))

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, number: int) -> Path:
        return self.folder / self.file_names[number]

    def image(self, number: int, image_size: int) -> np.ndarray:
        """uint8 `[image_size, image_size, 3]`."""
        return load_image(self.path(number), image_size)

    def camera(self, number: int) -> np.ndarray:
        """Where the camera stood `[3]`, from `pixel_coords`; NaN where these do not determine it."""
        return locate_camera(self.centres[number], self.pixels[number], self.pixel_size)

    def _parse(self, content: bytes, scenes_file: Path) -> list[_Scene]:
        waiting = 0

        def reduce(pairs: list[tuple[str, Any]]) -> Any:
            # Each scene becomes arrays as soon as it is read: as Python objects 70,000 scenes would take gigabytes.
            nonlocal waiting
            record, waiting = unique_keys(pairs), waiting + 1
            if "image_filename" in record:
                waiting = 0
                return self._scene(record)
            if waiting > MOST_RECORDS:
                raise InputError(f"a scene has more than {MOST_RECORDS} objects or other records, expected a few")
            return None if record.keys() >= {"left", "right"} else record

        try:
            document = json.loads(content, object_pairs_hook=reduce)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{scenes_file} is not valid JSON: {error.msg} at character {error.pos} of {len(error.doc)}; "
                "the file may be cut short, unpack or copy it again"
            ) from error
        except InputError as error:  # a ValueError, too
            raise InputError(f"{scenes_file}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{scenes_file} is not valid JSON ({error}); unpack or copy it again") from error
        scenes = document.get("scenes") if isinstance(document, dict) else None
        if not isinstance(scenes, list) or not scenes:
            raise InputError(f"{scenes_file}: expected a list 'scenes' with at least one scene, as in CLEVR_v1.0")
        for number, scene in enumerate(scenes):
            if not isinstance(scene, _Scene):
                raise InputError(f"{scenes_file}: scene {number} has no 'image_filename'")
        for name in ("file_name", "index"):  # of two with one name, one image would count twice
            values = [getattr(scene, name) for scene in scenes]
            if len(set(values)) < len(values):
                twice = next(value for value, count in Counter(values).items() if count > 1)
                raise InputError(
                    f"{scenes_file}: two scenes have the {name.replace('_', ' ')} {shown(twice)}; remove one"
                )
        return scenes

    def _scene(self, record: Mapping[str, Any]) -> _Scene:
        name, objects, index = record["image_filename"], record.get("objects"), record.get("image_index")
        if not _is_plain(name):
            raise InputError(f"image_filename {shown(name)}: expected a plain file name, without a folder")
        if not isinstance(objects, list) or not all(isinstance(obj, dict) for obj in objects):
            raise InputError(f"{name}: expected a list 'objects' of records")
        if type(index) is not int or not 0 <= index <= LARGEST_NUMBER:  # a bool is an int to Python
            raise InputError(f"{name}: expected an 'image_index' of at least 0, got {shown(index)}")
        if len(objects) > self.schema.max_objects:
            raise InputError(
                f"{name} has {len(objects)} objects, but schema {self.schema.name!r} holds at most "
                f"{self.schema.max_objects}; leave the image out or use a schema with a larger max_objects"
            )
        elements = np.zeros((self.schema.max_objects, self.schema.set_dim), dtype=np.float32)
        centres, pixels = np.full((2, self.schema.max_objects, 3), np.nan)
        for number, obj in enumerate(objects):
            try:
                if "3d_coords" not in obj:
                    raise InputError(f"an object lacks '3d_coords'; it has {shown(sorted(obj))}")
                elements[number] = self.schema.encode([obj | {"coords": obj["3d_coords"]}], set_size=1)[0]
                centres[number] = obj["3d_coords"]
                if "pixel_coords" in obj:
                    pixels[number] = _three_numbers("pixel_coords", obj["pixel_coords"])
            except (InputError, ValueError, TypeError, OverflowError) as error:
                raise InputError(f"{name}, object {number}: {error}") from error
        return _Scene(name, index, elements, centres, pixels)

    def _check_images(self) -> None:
        folder = self.folder
        try:
            there = set(os.listdir(folder))
        except OSError as error:
            raise InputError(f"cannot read the folder {folder} ({error.strerror}); unpack CLEVR again") from error
        missing = [name for name in self.file_names if name not in there]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self)} images are missing in {folder}, the first is {missing[0][:80]}; "
                "unpack CLEVR again"
            )


def locate_camera(centres: np.ndarray, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Location `[3]` of the camera that saw `centres` at `pixels`, NaN if undetermined.

    The pixels count in images of `size`, or in CLEVR's own, of which these may be smaller copies.
    """
    known = np.isfinite(centres).all(-1) & np.isfinite(pixels).all(-1)
    for width, height in dict.fromkeys((size, PIXEL_SIZE)):
        camera = fit_camera(centres[known], pixels[known], width, height)
        if camera is not None:
            return np.array(camera.location, dtype=np.float64)
    return np.full(3, np.nan)


def _scenes_file(root: Path, split: str) -> Path:
    if not _is_plain(split):
        raise InputError(f"the split {shown(split)}: expected a plain name, such as train or val")
    if not root.is_dir():
        raise InputError(f"expected a folder in the CLEVR_v1.0 layout, but {root} is no folder; see data/README.md")
    scenes_file = root / "scenes" / f"CLEVR_{split}_scenes.json"
    if scenes_file.is_file():
        return scenes_file
    generated = root / "CLEVR_scenes.json"
    if split == "new" and generated.is_file():
        return generated
    found = sorted(path.name[len("CLEVR_") : -len("_scenes.json")] for path in root.glob("scenes/CLEVR_*_scenes.json"))
    found += ["new"] if generated.is_file() else []
    which = f"in {root} there are those of {' and '.join(found)}" if found else f"in {root} there are none"
    if split == "test":
        raise InputError(f"CLEVR publishes no scenes for the split 'test', only for train and val; {which}")
    raise InputError(f"the split {split!r} has no scenes: expected {scenes_file}, but {which}")


def _read(path: Path) -> bytes:
    try:
        size = require_regular(path, advice="unpack CLEVR again")
        if size > MOST_BYTES:
            raise InputError(
                f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}, as it is read as a whole; split it"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file in a folder, and nothing else."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and Path(name).name == name


def _three_numbers(name: str, values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != 3 or not all(type(value) in (int, float) for value in values):
        raise InputError(f"{name}: expected 3 numbers, got {shown(values)}")
    return values


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
    """Decodes and resizes a split of a CLEVR_v1.0 folder into a file of `setpred.data.hdf5`'s format.

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
