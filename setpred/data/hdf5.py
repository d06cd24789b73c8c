"""The file format of prepared images: what is in it, opening it, checking it.

An HDF5 file of n square images of side S with their sets (N = schema.max_objects, D = schema.set_dim):

    images    uint8   [n, S, S, 3]   one chunk per image
    elements  float32 [n, N, D]      as `ElementSchema.encode` writes them: present first, zero padded
    camera    float64 [n, 3]         where the camera stood, NaN where unknown
    index     int64   [n]            the image's number in its source

and the attributes `format`, `version`, `schema` and `source` (JSON), `images` and `objects` (counts), `image_size`,
`producer` (a fingerprint of what made the images) and `sha256` (of header and rows).

The images are not compressed. Measured on 128x128 Blender renderings, LZF halves the file (full CLEVR: 3.4 GB) and
makes a batch of 128 random images ten times as slow to read (17 ms against 1.7 ms); without compression every image
also has its place from the start, so that an interrupted file can be continued.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from setpred.errors import InputError, reason, shown
from setpred.files import LARGEST_IMAGE, parse_json
from setpred.schema import PRESENCE, ElementSchema

FORMAT, VERSION = "setpred", 1
BLOCK = 256  # images per read
MOST_IMAGES = 10**8  # of a file, as the commands that make them have it
LONGEST_TEXT = 1_000_000  # characters of an attribute; schema and source of ours have a few hundred


class Record(NamedTuple):
    """One row of the file."""

    image: np.ndarray
    elements: np.ndarray
    camera: np.ndarray
    index: int


@dataclass(frozen=True)
class Header:
    """What a file holds, known before the first image is written. `source` has plain types only."""

    images: int
    image_size: int
    schema: ElementSchema
    source: Mapping[str, Any]

    def to_json(self) -> str:
        content = {"version": VERSION, "images": self.images, "image_size": self.image_size}
        return plain_json(content | {"schema": self.schema.to_dict(), "source": dict(self.source)})

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every data set."""
        n, side = self.images, self.image_size
        return {
            "images": ((n, side, side, 3), "|u1"),
            "elements": ((n, self.schema.max_objects, self.schema.set_dim), "<f4"),
            "camera": ((n, 3), "<f8"),
            "index": ((n,), "<i8"),
        }


def plain_json(value: Any) -> str:
    """One way only to write a value, so that equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def open_set_file(path: str | os.PathLike[str]) -> h5py.File:
    """Opens a finished file for reading.

    Raises:
        InputError: no such file, not HDF5, cut short, not readable.
    """
    path = Path(path)
    if not path.is_file():
        unfinished = path.with_name(path.name + ".partial")
        hint = f"; {unfinished.name} lies there: run the command that makes it again, it goes on" * unfinished.is_file()
        raise InputError(f"expected a prepared HDF5 file, but there is no file {path}{hint}")
    try:
        # Finished files never change, and locks fail on some network and read-only file systems.
        return h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise InputError(f"no permission to read {path}; change its permissions") from error
    except Exception as error:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an HDF5 file; make one with python -m setpred data") from error
        raise InputError(f"{path} is cut short or damaged ({reason(error)[:200]}); copy or make it again") from error


def read_header(file: h5py.File, path: str | os.PathLike[str]) -> Header:
    """The header of an open file, after checking that the data sets are as it says, and all of them in the file.

    Raises:
        InputError: a file of another program or a newer version, a damaged one, or one whose data sets lie in other
            files, are compressed, or have fewer bytes than numbers: the memory they take is that of the file.
    """
    try:
        if "format" not in file.attrs or _attribute(file, "format", str) != FORMAT:
            raise InputError(f"{path} is an HDF5 file, but not one of setpred's; make one with python -m setpred data")
        if (version := _attribute(file, "version", int)) != VERSION:
            raise InputError(f"{path} has format version {version}, this setpred reads {VERSION}; prepare it again")
        try:
            header = _parse_header(file)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; copy or make it again") from error
        for name, (shape, dtype) in header.layout().items():
            _check_stored(file, name, shape, np.dtype(dtype), path)
    except InputError:
        raise
    except Exception as error:  # HDF5 fails in many ways at the bytes of a stranger
        raise _damaged(path, error) from error
    return header


def _damaged(path: str | os.PathLike[str], error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({reason(error)[:200]}); copy or make it again")


def _parse_header(file: h5py.File) -> Header:
    described, source = (parse_json(_attribute(file, name, str), f"its {name}") for name in ("schema", "source"))
    if not isinstance(source, dict):
        raise InputError(f"its source is {shown(source)}, expected an object of JSON")
    images, image_size = (_attribute(file, name, int) for name in ("images", "image_size"))
    if not (1 <= images <= MOST_IMAGES and 1 <= image_size <= LARGEST_IMAGE):
        raise InputError(f"it claims {images} images of side {image_size}")
    return Header(images, image_size, ElementSchema.from_dict(described), source)


def _attribute(file: h5py.File, name: str, kind: type) -> Any:
    """One text or whole number, as the writer writes them."""
    if file.attrs.get_id(name).shape != ():
        raise InputError(f"its attribute {name} is an array, expected one value")
    value = file.attrs[name]
    if kind is int and isinstance(value, np.integer):
        return int(value)
    if not isinstance(value, kind):
        raise InputError(f"its attribute {name} is {shown(value)}, expected {kind.__name__}")
    if kind is str and len(value) > LONGEST_TEXT:
        raise InputError(f"its attribute {name} has {len(value)} characters, expected at most {LONGEST_TEXT}")
    return value


def _check_stored(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, path: str | os.PathLike[str]
) -> None:
    """A data set of this shape and type, all of whose numbers lie in this file as they are."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise InputError(f"{path}: {name} is a link to elsewhere, expected the data itself; do not trust it")
    stored = file[name]
    if stored.shape != shape or stored.dtype != dtype:
        raise InputError(f"{path}: expected {name} {list(shape)} {dtype.str}, got {list(stored.shape)} {stored.dtype}")
    properties = stored.id.get_create_plist()
    if stored.is_virtual or properties.get_external_count():
        raise InputError(f"{path}: {name} is taken from other files, expected the data itself; do not trust it")
    if properties.get_nfilters():
        raise InputError(f"{path}: {name} is compressed or filtered, which ours never are; do not trust it")
    size = math.prod(shape) * dtype.itemsize
    if stored.id.get_storage_size() != size or size > file.id.get_filesize():
        raise InputError(
            f"{path} is damaged: {name} takes {size} bytes, of which it has {stored.id.get_storage_size()}, in a file "
            f"of {file.id.get_filesize()}; copy or make it again"
        )


class Rows(NamedTuple):
    """All of a file but its images, a row for each image."""

    elements: np.ndarray
    camera: np.ndarray
    index: np.ndarray


def read_sets(file: h5py.File, header: Header, path: str | os.PathLike[str], images: int | None = None) -> Rows:
    """The sets, cameras and numbers of the images (of the first `images`), checked to be such.

    Raises:
        InputError: a set is malformed, an image has no number of its own, a camera stands at infinity.
    """
    try:
        rows = Rows(*(file[name][:images] for name in Rows._fields))
    except Exception as error:
        raise _damaged(path, error) from error
    check_rows(rows, header.schema, path)
    _check_apart(rows.index, path)
    return rows


def _check_apart(index: np.ndarray, path: str | os.PathLike[str]) -> None:
    if len(np.unique(index)) < len(index):  # one image would count twice
        raise InputError(f"{path} is damaged: two of its images have one number; copy or make it again")


def check_rows(rows: Rows, schema: ElementSchema, path: str | os.PathLike[str]) -> None:
    """Raises `InputError` at the first row that is none."""
    for start in range(0, len(rows.index), BLOCK):
        elements, camera, index = (part[start : start + BLOCK] for part in rows)
        for fault, wrong in (
            ("the set of image {} is malformed", malformed(elements, schema)),
            ("an image has the number {}, expected at least 0", index < 0),
            ("the camera of image {} is at infinity", np.isinf(camera).any(1)),
        ):
            if wrong.any():
                raise InputError(f"{path}: {fault.format(index[wrong.argmax()])}; make it again")


def read_images(file: h5py.File, index: np.ndarray) -> np.ndarray:
    """The images with these numbers, in this order.

    One by one in the file's order: HDF5's own selection takes 383 ms for a batch of 128 random images, this 1.7 ms.
    """
    stored = file["images"]
    images = np.empty((len(index), *stored.shape[1:]), dtype=np.uint8)
    for position in np.argsort(index, kind="stable"):
        images[position] = stored[index[position]]
    return images


def read_rows(file: h5py.File, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of (images, elements, camera, index) in order."""
    stop = len(file["index"]) if stop is None else stop
    for start in range(0, stop, BLOCK):
        rows = slice(start, min(start + BLOCK, stop))
        images = read_images(file, np.arange(rows.start, rows.stop))
        yield images, *(file[name][rows] for name in ("elements", "camera", "index"))


class Checksum:
    """SHA-256 over the header, then image, elements, camera and index of every row in order."""

    def __init__(self, header: Header) -> None:
        self._hash = hashlib.sha256(header.to_json().encode())

    def update(self, images: np.ndarray, elements: np.ndarray, camera: np.ndarray, index: np.ndarray) -> None:
        for row in zip(images, elements, camera, index, strict=True):
            for part, dtype in zip(row, ("|u1", "<f4", "<f8", "<i8"), strict=True):
                self._hash.update(np.ascontiguousarray(part, dtype=dtype).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def verify(path: str | os.PathLike[str]) -> Header:
    """Reads the whole file and compares its checksum; also checks that the sets are sets.

    Raises:
        InputError: the file cannot be read, its content is not what was written, or a set is malformed.
    """
    with open_set_file(path) as file:
        header = read_header(file, path)
        checksum, present, numbers = Checksum(header), 0, []
        try:
            for images, elements, camera, index in read_rows(file):
                checksum.update(images, elements, camera, index)
                check_rows(Rows(elements, camera, index), header.schema, path)
                present += int(header.schema.values(elements, PRESENCE).sum())
                numbers.append(index)
            _check_apart(np.concatenate(numbers), path)
            objects, digest = _attribute(file, "objects", int), _attribute(file, "sha256", str)
        except InputError:
            raise
        except Exception as error:
            raise _damaged(path, error) from error
    if checksum.hexdigest() != digest or present != objects:
        raise InputError(f"{path}: the content is not what was written (SHA-256 differs); copy or make it again")
    return header


def malformed(elements: np.ndarray, schema: ElementSchema) -> np.ndarray:
    """Which sets `[n]` of `elements [n, N, D]` are not as `ElementSchema.encode` writes them."""
    presence = schema.values(elements, PRESENCE)
    present = presence == 1
    wrong = ~np.isfinite(elements).all((1, 2)) | ~np.isin(presence, (0, 1)).all(1)
    wrong |= (present[:, 1:] & ~present[:, :-1]).any(1)  # a gap before a present element
    wrong |= ((elements != 0).any(-1) & ~present).any(1)  # padding that is not zero
    for field in schema.categorical:
        scores = elements[..., schema.slice(field.name)]
        one_hot = np.isin(scores, (0, 1)).all(-1) & (scores.sum(-1) == 1)
        wrong |= (present & ~one_hot).any(1)
    return wrong
