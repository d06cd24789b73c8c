"""Import CLEVR with masks: the published TFRecord file, and HDF5 copies of it and of similar data sets.

An example has an image, a mask of the background and of each object, and perhaps attributes of the objects. Materials,
colours, shapes and sizes are codes from 1 on, whose meaning is not published: they become classes "1", "2", ... Images
of 320x240 pixels are cut to the square that the literature uses.

Source: Kabra et al., Multi-Object Datasets, 2019, github.com/google-deepmind/multi_object_datasets (Apache 2.0). The
square: IODINE (Greff et al., ICML 2019) and Slot Attention (Locatello et al., NeurIPS 2020), code.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from setpred.data.hdf5 import Header, Record, own_array
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import fitted
from setpred.data.importing import checked_image_size
from setpred.data.overrides import Overrides
from setpred.data.tfrecord import Example, read_records
from setpred.errors import InputError, listed, reason
from setpred.progress import progress
from setpred.schema import CLEVR, ElementSchema, categorical, continuous

HEIGHT, WIDTH, ENTITIES = 240, 320, 11  # of the published file; the first entity is the background
SQUARE = np.s_[29:221, 64:256]
PLACE = ("x", "y", "z")
CODES = {field.name: len(field.classes) for field in CLEVR.categorical}
NAMES = {"image": ("image", "imgs"), "mask": ("mask", "masks")}  # in copies
ADVICE = "download the file again"


class MaskedImage(NamedTuple):
    """An example, cut to its square.

    image: uint8 `[side, side, 3]`; entities: what each pixel shows, 0 for the background, uint8 `[side, side]`;
    objects: the entities that are objects, in order; attributes: by name a value for each entity, maybe none;
    number: of the example in its file; where: its place for messages.
    """

    image: np.ndarray
    entities: np.ndarray
    objects: np.ndarray
    attributes: Mapping[str, np.ndarray]
    number: int
    where: str


def import_masks(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    max_objects: int | None = None,
    records: Sequence[int] | None = None,
    group: str | None = None,
    overrides: Overrides | None = None,
    workers: int = 0,
    force: bool = False,
) -> ElementSchema:
    """Write CLEVR with masks, or an HDF5 copy, as a prepared file with `instances`; return its schema.

    Objects have the fields of CLEVR; in copies without attributes, the centre of their visible pixels.

    Args:
        image_size: side of the stored images; 128, or 64 for images of at most 64, by default.
        max_objects: keep the images of at most so many objects: 6 for CLEVR6.
        records: number of the first example, and the one after the last; all by default.
        group: group of an HDF5 copy that has several.
        overrides: names of the fields and classes.
        workers: processes that resize.

    Raises:
        InputError: a file, or an example with its number, that is damaged or of another kind; no file is written.
    """
    path, overrides = Path(path), overrides or Overrides()
    first, end = records or (0, None)
    if first < 0 or (end is not None and end <= first) or (max_objects is not None and max_objects < 1):
        raise InputError(f"expected records FIRST < END and at least 1 object, got {records} and {max_objects}")
    source = (_Copy if path.is_file() and h5py.is_hdf5(path) else _Published)(path, group)
    found = progress(source.counts(first, end, max_objects), total=end and end - first, description="counting objects")
    counts = list(found)
    kept = [first + n for n, count in enumerate(counts) if max_objects is None or count <= max_objects]
    if not kept or (end is not None and len(counts) < end - first):
        few = f"{first} to {'the last' if end is None else end - 1}"
        few += "" if max_objects is None else f", some of at most {max_objects} objects"
        raise InputError(f"{path}: expected records {few}, got {len(counts)} records, {len(kept)} of them such")
    size = checked_image_size(image_size, source.side)
    schema = _schema(source.attributed, size, max_objects or max(counts) or 1, overrides)
    origin = {"kind": "clevr with masks", "from": path.name, "records": [first, first + len(counts)]}
    write_set_file(
        out,
        Header(len(kept), size, schema, origin | ({"max_objects": max_objects} if max_objects else {}), instances=True),
        _Kept(source, kept),
        partial(_records, size=size, schema=schema, overrides=overrides),
        producer=f"pillow {pillow_version}, {path.stat().st_size}, {path.stat().st_mtime_ns}, {overrides.fields}",
        description=f"importing {size}x{size}",
        workers=workers,
        force=force,
    )
    return schema


def _schema(attributed: bool, size: int, max_objects: int, overrides: Overrides) -> ElementSchema:
    codes = CODES if attributed else {}
    overrides.check_names(["coords", *codes])
    overrides.options("coords")  # has none but a name
    place = continuous("coords", 2, scale=size / 2, offset=size / 2, unit="pixels")
    fields = [CLEVR.field("coords") if attributed else place]
    for name, count in codes.items():
        fields.append(categorical(name, *overrides.classes(name, tuple(map(str, range(1, count + 1))))))
    fields = [replace(field, name=overrides.renamed(field.name)) for field in fields]
    return ElementSchema(overrides.name or "clevr_with_masks", fields, max_objects=overrides.max_objects or max_objects)


def _records(
    examples: Iterable[MaskedImage], *, size: int, schema: ElementSchema, overrides: Overrides
) -> list[Record]:
    records = []
    for image, entities, objects, attributes, number, where in examples:
        rows = np.zeros(256, np.uint8)
        rows[objects] = np.arange(1, len(objects) + 1)
        if stray := set(np.unique(entities).tolist()) - {0, *objects.tolist()}:
            raise InputError(f"{where}: the mask has pixels of entity {min(stray)}, which is no object there; {ADVICE}")
        instances = np.array(Image.fromarray(rows[entities]).resize((size, size), Image.Resampling.NEAREST))
        found: list[dict[str, Any]] = []
        for row, entity in enumerate(objects.tolist(), start=1):
            if attributes:
                codes = {name: int(attributes[name][entity]) for name in CODES}
                if wrong := [name for name, code in codes.items() if not 1 <= code <= CODES[name]]:
                    name = wrong[0]
                    raise InputError(f"{where}: expected {name} from 1 to {CODES[name]}, got {codes[name]}; {ADVICE}")
                coords = [float(attributes[name][entity]) for name in PLACE]
                found.append({"coords": coords} | {name: str(code) for name, code in codes.items()})
            elif (seen := np.argwhere(instances == row)).size:  # an object outside the square is left out
                instances[instances == row] = len(found) + 1
                found.append({"coords": (seen.mean(0)[::-1] + 0.5).tolist()})
        try:
            elements = schema.encode([overrides.applied(obj) for obj in found])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        picture = fitted(Image.fromarray(image), size)
        records.append(Record(picture, elements, np.full(3, np.nan), number, instances))
    return records


def _square(where: str, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and entities, cut to the square; `mask` has a map of each entity, or is a map of entities."""
    height, width = image.shape[:2]
    cut = SQUARE if (height, width) == (HEIGHT, WIDTH) else np.s_[:, :]
    if mask.shape[:2] == (height, width):
        entities = mask.reshape(height, width)[cut]
        if not np.isin(entities, np.arange(256)).all():
            raise InputError(f"{where}: expected entities 0 to 255 in the mask, got others, up to {entities.max()}")
    else:
        stack = mask.reshape(-1, height, width)[:, *cut]
        entities = (stack > stack.max() / 2).argmax(0)  # the background where nothing is
    return np.ascontiguousarray(image[cut]), entities.astype(np.uint8)


class _Kept(Sequence[MaskedImage]):
    """The examples of some numbers; read when asked for, so that a long file passes by."""

    def __init__(self, source: "_Published | _Copy", numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, some: slice) -> list[MaskedImage]:
        return [self.source.example(number) for number in self.numbers[some]]


class _Published:
    """The TFRecord file; read once if its examples are asked for in order."""

    side, attributed = HEIGHT, True

    def __init__(self, path: Path, group: str | None) -> None:
        if group is not None:
            raise InputError(f"{path}: expected an HDF5 file for the group {group!r}, got another; leave it out")
        self.path, self._next, self._read = path, 0, iter(())

    def counts(self, first: int, end: int | None, max_objects: int | None) -> Iterator[int]:
        """Count the objects of the examples; check the data of those with too many, which nobody reads later."""
        for record in itertools.islice(read_records(self.path), first, end):
            count = len(self._objects(Example(record)))
            if max_objects is not None and count > max_objects:
                record.check()
            yield count

    def example(self, number: int) -> MaskedImage:
        if not 0 < self._next <= number:
            self._next, self._read = 0, read_records(self.path)
        record = next(itertools.islice(self._read, number - self._next, None))
        self._next = number + 1
        record.check()
        example = Example(record)
        image = example.bytes("image", HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3)
        mask = example.bytes("mask", ENTITIES * HEIGHT * WIDTH).reshape(ENTITIES, HEIGHT, WIDTH)
        attributes = {name: example.floats(name, ENTITIES) for name in PLACE}
        attributes |= {name: example.bytes(name, ENTITIES) for name in CODES}
        square = _square(record.where, image, mask)
        return MaskedImage(*square, self._objects(example), attributes, number, record.where)

    def _objects(self, example: Example) -> np.ndarray:
        return 1 + np.flatnonzero(example.floats("visibility", ENTITIES)[1:] > 0.5)


class _Copy:
    """An HDF5 file: images uint8 `[n, H, W, 3]`, masks `[n, entities, H, W, 1]` or `[n, H, W]`, perhaps attributes."""

    def __init__(self, path: Path, group: str | None) -> None:
        self.path = path
        try:
            inside = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise InputError(f"{path} is cut short or damaged ({reason(error)}); {ADVICE}") from error
        if group is not None:
            if not isinstance(inside.get(group, getlink=True), h5py.HardLink) or isinstance(
                inside[group], h5py.Dataset
            ):
                raise InputError(f"{path}: expected a group {group!r}, got another file; leave out --group")
            inside = inside[group]
        found = {name: name for name in ("visibility", *PLACE, *CODES) if name in inside}
        for name, other in NAMES.items():
            if not (there := [each for each in other if each in inside]):
                hint = "; pass --group" if any(isinstance(each, h5py.Group) for each in inside.values()) else ""
                raise InputError(f"{path}: expected an array {' or '.join(other)}, got {listed(sorted(inside))}{hint}")
            found[name] = there[0]
        self._arrays = {name: own_array(inside, there) for name, there in found.items()}
        for name, array in self._arrays.items():
            if array is None or array.dtype.kind not in "buif" or not array.ndim:
                raise InputError(f"{path}: expected an array of numbers {found[name]!r} in this file, got other data")
        image, mask = (self._arrays[name].shape for name in NAMES)
        if len({len(array) for array in self._arrays.values()}) > 1:
            raise InputError(f"{path}: expected as many masks and attributes as images, {image[0]}, got other numbers")
        if len(image) != 4 or image[3] != 3 or self._arrays["image"].dtype != np.uint8:
            raise InputError(f"{path}: expected images uint8 [n, height, width, 3], got {list(image)}")
        height, width = image[1:3]
        if (height, width) != (HEIGHT, WIDTH) and height != width:
            raise InputError(f"{path}: expected images of {WIDTH}x{HEIGHT} pixels or squares, got {width}x{height}")
        sizes = ((height, width), (height, width, 1))
        if mask[1:] not in sizes and mask[2:] not in sizes:
            raise InputError(f"{path}: expected masks of {width}x{height} pixels, got an array {list(mask)}")
        self.side, self.attributed = height, self._arrays.keys() >= {*PLACE, *CODES}

    def counts(self, first: int, end: int | None, max_objects: int | None) -> Iterator[int]:
        for number in range(len(self._arrays["image"]))[first:end]:
            yield len(self._objects(number))

    def example(self, number: int) -> MaskedImage:
        where = f"{self.path}, record {number}"
        names = (*PLACE, *CODES) if self.attributed else ()
        attributes = {name: self._row(name, number).ravel() for name in names}
        square = _square(where, self._row("image", number), self._row("mask", number))
        return MaskedImage(*square, self._objects(number), attributes, number, where)

    def _row(self, name: str, number: int) -> np.ndarray:
        try:
            return self._arrays[name][number]
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}, record {number}: it is damaged ({reason(error)}); {ADVICE}") from error

    def _objects(self, number: int) -> np.ndarray:
        """The entities but the background that are visible or, where the copy does not say, have a pixel."""
        if "visibility" in self._arrays:
            return 1 + np.flatnonzero(self._row("visibility", number).ravel()[1:] > 0.5)
        mask = self._row("mask", number)
        if mask.shape[:2] == self._arrays["image"].shape[1:3]:
            return np.unique(mask[mask > 0]).astype(int)
        return 1 + np.flatnonzero(mask[1:].any(tuple(range(1, mask.ndim))))
