"""Read the CLEVR data set, and prepare it as one HDF5 file."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import __version__ as pillow_version

from setpred.data.hdf5 import Header, Record, set_sizes
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import PIXEL_SIZE, fitted, load_image, load_mask, pixel_size, read_image
from setpred.errors import InputError, shown
from setpred.files import LARGEST_NUMBER, require_regular, unique_keys
from setpred.rendering.camera import fit_camera
from setpred.schema import CLEVR, ElementSchema

MOST_BYTES = 2**29  # of a file of scenes; CLEVR v1.0's largest, for 70,000 images, has about 10**8
MOST_RECORDS = 10_000  # between one scene and the next, its objects among them, which are in memory together


class _Scene(NamedTuple):
    file_name: str
    index: int
    elements: np.ndarray
    centres: np.ndarray
    pixels: np.ndarray


class ClevrFolder:
    """One split of a folder in the CLEVR_v1.0 layout, its annotations as arrays.

    Attributes:
        elements: float32 `[n, schema.max_objects, schema.set_dim]`, encoded by the schema, zero padded.
        index: int64 `[n]`, CLEVR's `image_index`.
        centres, pixels: float64 `[n, schema.max_objects, 3]`, `3d_coords` and `pixel_coords`, NaN where padded.
        source: origin of the images, in plain types.
        pixel_size: width and height of the first image, the unit of `pixel_coords`.

    Raises:
        InputError: something is wrong with the folder; names the file, image and object.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, schema: ElementSchema = CLEVR, images: int | None = None
    ) -> None:
        self.root, self.split, self.schema = Path(root), split, schema
        if images is not None and images < 1:
            raise InputError(f"expected at least 1 image, got {images}")
        scenes_file = _scenes_file(self.root, split)
        # clevr-dataset-gen writes no folder for the split
        self.folder = self.root / "images" / ("" if scenes_file.parent == self.root else split)
        content = _read(scenes_file)
        scenes = self._parse(content, scenes_file)[:images]
        self.file_names, index, *arrays = zip(*scenes, strict=True)
        self.index = np.array(index, dtype=np.int64)
        self.elements, self.centres, self.pixels = map(np.stack, arrays)
        self.source = {"kind": "clevr", "folder": self.root.resolve().name, "split": split}
        self.source["scenes_sha256"] = sha256(content).hexdigest()
        _check_files(self.folder, self.file_names, "images", "unpack CLEVR again")
        self.pixel_size = pixel_size(self.path(0))

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, number: int) -> Path:
        return self.folder / self.file_names[number]

    def image(self, number: int, image_size: int) -> np.ndarray:
        """uint8 `[image_size, image_size, 3]`."""
        return load_image(self.path(number), image_size)

    def mask_paths(self) -> list[Path]:
        """The file of the mask of each image: masks/SPLIT/*.png, named as the images.

        Raises:
            InputError: a mask is missing.
        """
        folder = self.root / "masks" / self.folder.relative_to(self.root / "images")
        names = [f"{Path(name).stem}.png" for name in self.file_names]
        _check_files(folder, names, "masks", "leave out --masks, or render the folder with it")
        return [folder / name for name in names]

    def camera(self, number: int) -> np.ndarray:
        """Location `[3]` of the camera, from `pixel_coords`; NaN where these do not determine it."""
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
        except InputError as error:  # a ValueError, too
            raise InputError(f"{scenes_file}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{scenes_file} of {len(content)} bytes is not valid JSON ({error}); it may be cut short, unpack or "
                "copy it again"
            ) from error
        scenes = document.get("scenes") if isinstance(document, dict) else None
        if not isinstance(scenes, list) or not scenes:
            raise InputError(f"{scenes_file}: expected a list 'scenes' with at least one scene, as in CLEVR_v1.0")
        for number, scene in enumerate(scenes):
            if not isinstance(scene, _Scene):
                raise InputError(f"{scenes_file}: scene {number} has no 'image_filename'")
        names, indices, *_ = zip(*scenes, strict=True)
        for name, values in (("file name", names), ("index", indices)):  # otherwise one image would count twice
            ((value, count),) = Counter(values).most_common(1)
            if count > 1:
                raise InputError(f"{scenes_file}: two scenes have the {name} {shown(value)}; remove one")
        return scenes

    def _scene(self, record: Mapping[str, Any]) -> _Scene:
        name, objects, index = record["image_filename"], record.get("objects"), record.get("image_index")
        if not _is_plain(name):
            raise InputError(f"image_filename {shown(name)}: expected a plain file name, without a folder")
        if not isinstance(objects, list) or not all(isinstance(obj, dict) for obj in objects):
            raise InputError(f"{name}: expected a list 'objects' of records")
        if type(index) is not int or not 0 <= index <= LARGEST_NUMBER:  # a bool is an int to Python
            raise InputError(f"{name}: expected an 'image_index' of at least 0, got {shown(index)}")
        if len(objects) > (most := self.schema.max_objects):
            raise InputError(
                f"{name} has {len(objects)} objects, but schema {self.schema.name!r} holds at most {most}; leave the "
                "image out or use a larger schema"
            )
        elements = np.zeros((most, self.schema.set_dim), dtype=np.float32)
        centres, pixels = np.full((2, most, 3), np.nan)
        for number, obj in enumerate(objects):
            try:
                if "3d_coords" not in obj:
                    raise InputError(f"an object lacks '3d_coords'; it has {shown(sorted(obj))}")
                elements[number] = self.schema.encode([obj | {"coords": obj["3d_coords"]}], set_size=1)[0]
                centres[number] = obj["3d_coords"]
                if "pixel_coords" in obj:
                    pixels[number] = three = obj["pixel_coords"]
                    if len(three) != 3 or not all(type(value) in (int, float) for value in three):
                        raise InputError(f"pixel_coords: expected 3 numbers, got {shown(three)}")
            except (InputError, ValueError, TypeError, OverflowError) as error:
                raise InputError(f"{name}, object {number}: {error}") from error
        return _Scene(name, index, elements, centres, pixels)


def _check_files(folder: Path, names: Sequence[str], what: str, advice: str) -> None:
    """Raise `InputError` unless all files of these names are in the folder."""
    try:
        missing = sorted(set(names).difference(os.listdir(folder)))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder} ({error.strerror}); {advice}") from error
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} {what} are missing in {folder}, the first is {missing[0][:80]}; {advice}"
        )


def locate_camera(centres: np.ndarray, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Location `[3]` of the camera that saw `centres` at `pixels` of images of `size`, NaN if undetermined.

    Images of another size may be copies of CLEVR's: then the pixels are tried as CLEVR's.
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
    there = {path.name.removeprefix("CLEVR_").removesuffix("_scenes.json"): path for path in root.glob("scenes/*.json")}
    if (generated := root / "CLEVR_scenes.json").is_file():  # as clevr-dataset-gen leaves it
        there.setdefault("new", generated)
    if split in there:
        return there[split]
    which = f"in {root} there are those of {' and '.join(sorted(there)) or 'none'}"
    if split == "test":
        raise InputError(f"CLEVR publishes no scenes for the split 'test', only for train and val; {which}")
    expected = root / "scenes" / f"CLEVR_{split}_scenes.json"
    raise InputError(f"the split {split!r} has no scenes: expected {expected}, but {which}")


def _read(path: Path) -> bytes:
    try:
        if (size := require_regular(path, advice="unpack CLEVR again")) > MOST_BYTES:
            raise InputError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,} to read at once; split it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file in a folder, and nothing else."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and Path(name).name == name


def prepare_file(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    split: str,
    image_size: int,
    images: int | None = None,
    schema: ElementSchema = CLEVR,
    masks: bool = False,
    workers: int = 0,
    force: bool = False,
) -> str:
    """Decode and resize a split of a CLEVR_v1.0 folder into a file of `setpred.data.hdf5`'s format.

    Args:
        images: only the first so many.
        masks: keep the masks of the folder, masks/SPLIT/*.png, as `instances`: 0 is the background, k object k - 1.
        workers: processes that decode; 0 decodes in this one.
        force: replace the file if it exists.

    Returns:
        The SHA-256 of the content.

    Raises:
        InputError: something is wrong with the folder, an image or a mask, and what `write_set_file` raises.
    """
    if image_size < 8:
        raise InputError(f"expected images of at least 8x8 pixels, got {image_size}x{image_size}")
    folder = ClevrFolder(root, split, schema=schema, images=images)
    paths = [folder.path(number) for number in range(len(folder))]
    mask_paths = folder.mask_paths() if masks else [None] * len(folder)
    return write_set_file(
        path,
        Header(len(folder), image_size, schema, folder.source, instances=masks),
        list(zip(paths, folder.elements, folder.centres, folder.pixels, folder.index, mask_paths, strict=True)),
        partial(_prepared, image_size=image_size, pixel_size=folder.pixel_size, schema=schema),
        producer=f"pillow {pillow_version}",
        description=f"preparing {image_size}x{image_size}",
        workers=workers,
        force=force,
    )


def _prepared(
    items: Sequence[tuple[Any, ...]], *, image_size: int, pixel_size: tuple[int, int], schema: ElementSchema
) -> list[Record]:
    records = []
    for path, elements, centres, pixels, index, mask_path in items:
        image, mask = read_image(path), None
        if mask_path is not None:
            objects = int(set_sizes(elements[None], schema)[0])
            advice = "make the masks again, or leave out --masks"
            mask = load_mask(mask_path, image_size, size=image.size, objects=objects, advice=advice)
        camera = locate_camera(centres, pixels, pixel_size)
        records.append(Record(fitted(image, image_size), elements, camera, int(index), mask))
    return records
