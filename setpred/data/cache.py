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
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from setpred.errors import InputError
from setpred.schema import PRESENCE, ElementSchema

FORMAT, VERSION = "setpred", 1
BLOCK = 256  # images per read


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
    except (OSError, RuntimeError, KeyError) as error:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an HDF5 file; make one with python -m setpred.data") from error
        raise InputError(f"{path} is cut short or damaged ({error}); copy or make it again") from error


def read_header(file: h5py.File, path: str | os.PathLike[str]) -> Header:
    """The header of an open file, after checking that the data sets are as it says.

    Raises:
        InputError: a file of another program or a newer version, a damaged one.
    """
    try:
        if file.attrs.get("format") != FORMAT:
            raise InputError(f"{path} is an HDF5 file, but not one of setpred's; make one with python -m setpred.data")
        if (version := int(file.attrs["version"])) != VERSION:
            raise InputError(f"{path} has format version {version}, this setpred reads {VERSION}; prepare it again")
        schema = ElementSchema.from_dict(json.loads(file.attrs["schema"]))
        source = json.loads(file.attrs["source"])
        header = Header(int(file.attrs["images"]), int(file.attrs["image_size"]), schema, source)
        for name, (shape, dtype) in header.layout().items():
            if file[name].shape != shape or file[name].dtype != np.dtype(dtype):
                raise InputError(
                    f"{path}: expected {name} {list(shape)} {dtype}, got {list(file[name].shape)} {file[name].dtype}"
                )
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); copy or make it again") from error
    return header


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
        checksum, present = Checksum(header), 0
        try:
            for images, elements, camera, index in read_rows(file):
                checksum.update(images, elements, camera, index)
                present += int(header.schema.values(elements, PRESENCE).sum())
                if (wrong := malformed(elements, header.schema)).any():
                    raise InputError(f"{path}: the set of image {index[wrong.argmax()]} is malformed; make it again")
            objects, digest = int(file.attrs["objects"]), str(file.attrs["sha256"])
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}); copy or make it again") from error
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
