"""The file format of prepared images: what is in it, opening it, checking it.

An HDF5 file of n square images of side S with their sets (N = schema.max_objects, D = schema.set_dim):

    images    uint8   [n, S, S, 3]   one chunk per image
    elements  float32 [n, N, D]      as `ElementSchema.encode` writes them: present first, zero padded
    camera    float64 [n, 3]         location of the camera, NaN where unknown
    index     int64   [n]            number of the image in its source
    names     uint8   [bytes]        optional: the names of the images, a JSON list

and the attributes `format`, `version`, `schema` and `source` (JSON), `images` and `objects` (counts), `image_size`,
`producer` (a fingerprint of what made the images) and `sha256` (of header and rows).

The images are not compressed. On 128x128 Blender renderings LZF halves the file (full CLEVR: 3.4 GB) and makes a batch
of 128 random images ten times as slow to read (17 ms against 1.7 ms).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from setpred.errors import InputError, plural, reason, shown
from setpred.files import LARGEST_IMAGE, parse_json
from setpred.schema import PRESENCE, ElementSchema

FORMAT, VERSION = "setpred", 1
BLOCK = 256  # images per read
MOST_IMAGES = 10**8  # of a file, read or made: a slip of the finger should not fill a disk
NAMES = "names"  # of an array that need not be there
LONGEST_TEXT = 1_000_000  # characters of an attribute; schema and source of ours have a few hundred


class Record(NamedTuple):
    """One row of a file, or several with an axis in front."""

    image: np.ndarray
    elements: np.ndarray
    camera: np.ndarray
    index: int | np.ndarray


@dataclass(frozen=True)
class Header:
    """The description of a file, known before the first image is written. `source` has plain types only."""

    images: int
    image_size: int
    schema: ElementSchema
    source: Mapping[str, Any]

    def to_json(self) -> str:
        content = {"version": VERSION, "images": self.images, "image_size": self.image_size}
        return plain_json(content | {"schema": self.schema.to_dict(), "source": dict(self.source)})

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every array."""
        n, side = self.images, self.image_size
        return {
            "images": ((n, side, side, 3), "|u1"),
            "elements": ((n, self.schema.max_objects, self.schema.set_dim), "<f4"),
            "camera": ((n, 3), "<f8"),
            "index": ((n,), "<i8"),
        }


def plain_json(value: Any) -> str:
    """The one way to write a value, so that equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def open_set_file(path: str | os.PathLike[str]) -> h5py.File:
    """Open a finished file for reading.

    Raises:
        InputError: no such file, not HDF5, cut short, not readable.
    """
    path = Path(path)
    if not path.is_file():
        unfinished = path.with_name(path.name + ".partial")
        hint = f"; {unfinished.name} is there: run the command that makes it again to resume" * unfinished.exists()
        raise InputError(f"expected a prepared HDF5 file, but there is no file {path}{hint}")
    try:
        # Finished files never change, and locks fail on some network and read-only file systems.
        return h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise InputError(f"no permission to read {path}; change its permissions") from error
    except Exception as error:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an HDF5 file; make one with `setpred data`") from error
        raise InputError(f"{path} is cut short or damaged ({reason(error)[:200]}); copy or make it again") from error


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the many errors of HDF5 at untrusted bytes into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is damaged ({reason(error)[:200]}); copy or make it again") from error


def file_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a finished file; errors as in `open_set_file` and `read_header`."""
    with open_set_file(path) as file:
        return read_header(file, path)


def read_header(file: h5py.File, path: str | os.PathLike[str]) -> Header:
    """Read the header of an open file; check the arrays against it, and that this file stores them.

    Raises:
        InputError: a file of another program or a newer version, a damaged one, or one whose arrays are in other files,
            compressed, or have fewer bytes than numbers: arrays take no more memory than the file has bytes.
    """
    with _reading(path):
        if "format" not in file.attrs or _attribute(file, "format", str) != FORMAT:
            raise InputError(f"{path} is an HDF5 file, but not one of setpred's; make one with `setpred data`")
        if (version := _attribute(file, "version", int)) != VERSION:
            raise InputError(f"{path} has format version {version}, this setpred reads {VERSION}; prepare it again")
        try:
            header = _parse_header(file)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; copy or make it again") from error
        for name, (shape, dtype) in header.layout().items():
            if fault := _fault_of_storage(file, name, shape, np.dtype(dtype)):
                raise InputError(f"{path}: {fault}; do not trust it, copy or make it again")
    return header


def _parse_header(file: h5py.File) -> Header:
    described, source = (parse_json(_attribute(file, name, str), f"its {name}") for name in ("schema", "source"))
    if not isinstance(source, dict):
        raise InputError(f"its source is {shown(source)}, expected an object of JSON")
    images, image_size = (_attribute(file, name, int) for name in ("images", "image_size"))
    if not (1 <= images <= MOST_IMAGES and 1 <= image_size <= LARGEST_IMAGE):
        raise InputError(f"it claims {images} images of side {image_size}")
    return Header(images, image_size, ElementSchema.from_dict(described), source)


def _attribute(file: h5py.File, name: str, kind: type) -> Any:
    """One text or integer."""
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


def _fault_of_storage(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """The fault of an array that has another shape or type, or is not stored in this file as it is; None without."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return f"{name} is a link to elsewhere, expected the data itself"
    stored = file[name]
    if stored.shape != shape or stored.dtype != dtype:
        return f"expected {name} {list(shape)} {dtype.str}, got {list(stored.shape)} {stored.dtype}"
    properties = stored.id.get_create_plist()
    if stored.is_virtual or properties.get_external_count():
        return f"{name} is taken from other files, expected the data itself"
    if properties.get_nfilters():
        return f"{name} is compressed or filtered, expected neither"
    size, bytes_stored, bytes_of_file = (
        math.prod(shape) * dtype.itemsize,
        stored.id.get_storage_size(),
        file.id.get_filesize(),
    )
    if bytes_stored != size or size > bytes_of_file:
        return f"{name} takes {size} bytes, of which it has {bytes_stored}, in a file of {bytes_of_file}"
    return None


class Rows(NamedTuple):
    """All of a file but its images, a row for each image."""

    elements: np.ndarray
    camera: np.ndarray
    index: np.ndarray


def read_sets(file: h5py.File, header: Header, path: str | os.PathLike[str], images: int | None = None) -> Rows:
    """Read and check the sets, cameras and numbers of the (first `images`) images.

    Raises:
        InputError: a set is malformed, two images have one number, a camera is at infinity.
    """
    with _reading(path):
        rows = Rows(*(file[name][:images] for name in Rows._fields))
    for start in range(0, len(rows.index), BLOCK):
        elements, camera, index = (part[start : start + BLOCK] for part in rows)
        for fault, wrong in (
            ("the set of image {} is malformed", malformed(elements, header.schema)),
            ("an image has the number {}, expected at least 0", index < 0),
            ("the camera of image {} is at infinity", np.isinf(camera).any(1)),
        ):
            if wrong.any():
                raise InputError(f"{path}: {fault.format(index[wrong.argmax()])}; make it again")
    if len(np.unique(rows.index)) < len(rows.index):  # one image would count twice
        raise InputError(f"{path} is damaged: two of its images have one number; copy or make it again")
    return rows


def pack_names(names: Sequence[str] | None) -> np.ndarray:
    """The array `names` of a file, empty without names."""
    return np.frombuffer(b"" if names is None else plain_json(list(names)).encode(), np.uint8)


def read_names(file: h5py.File, images: int, path: str | os.PathLike[str]) -> list[str] | None:
    """Read the names of the images; None where a file does not have them. Raises `InputError` if they are damaged."""
    if (link := file.get(NAMES, getlink=True)) is None:
        return None
    with _reading(path):
        size = file[NAMES].size if isinstance(link, h5py.HardLink) else 0
        if fault := _fault_of_storage(file, NAMES, (size,), np.dtype("|u1")):
            raise InputError(f"{path}: {fault}; do not trust it, copy or make it again")
        names = parse_json(file[NAMES][:].tobytes(), f"{path}: names")
    if not isinstance(names, list) or len(names) != images or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is damaged: expected the names of {images} images, got {shown(names)}; make it again")
    return names


def read_images(file: h5py.File, index: np.ndarray) -> np.ndarray:
    """Read the images of these numbers, in this order.

    One by one in the file's order: HDF5's own selection takes 383 ms for a batch of 128 random images, this 1.7 ms.
    """
    stored = file["images"]
    images = np.empty((len(index), *stored.shape[1:]), dtype=np.uint8)
    for position in np.argsort(index, kind="stable"):
        images[position] = stored[index[position]]
    return images


class Checksum:
    """SHA-256 over the header, then image, elements, camera and index of every row in order, and the names if any."""

    def __init__(self, header: Header) -> None:
        self._hash = hashlib.sha256(header.to_json().encode())

    def update(self, images: np.ndarray, elements: np.ndarray, camera: np.ndarray, index: np.ndarray) -> None:
        for row in zip(images, elements, camera, index, strict=True):
            for part, dtype in zip(row, ("|u1", "<f4", "<f8", "<i8"), strict=True):
                self._hash.update(np.ascontiguousarray(part, dtype=dtype).data)

    def update_names(self, packed: np.ndarray) -> None:
        self._hash.update(packed.data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def verify(path: str | os.PathLike[str]) -> Header:
    """Read a file completely, check its sets and compare its checksum; return its header.

    Raises:
        InputError: the file cannot be read, its content is not what was written, or a set is malformed.
    """
    with open_set_file(path) as file:
        header = read_header(file, path)
        rows, checksum = read_sets(file, header, path), Checksum(header)
        with _reading(path):
            for start in range(0, header.images, BLOCK):
                some = slice(start, min(start + BLOCK, header.images))
                checksum.update(read_images(file, np.arange(some.start, some.stop)), *(part[some] for part in rows))
            checksum.update_names(pack_names(read_names(file, header.images, path)))
            objects, digest = _attribute(file, "objects", int), _attribute(file, "sha256", str)
    present = int(header.schema.values(rows.elements, PRESENCE).sum())
    if checksum.hexdigest() != digest or present != objects:
        raise InputError(f"{path}: the content is not what was written (SHA-256 differs); copy or make it again")
    return header


def malformed(elements: np.ndarray, schema: ElementSchema) -> np.ndarray:
    """Find the sets `[n]` of `elements [n, N, D]` that `ElementSchema.encode` would not write."""
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


def describe(path: str | os.PathLike[str]) -> str:
    """Describe a file: counts, sizes, schema and source, objects per image, and how often each class occurs.

    Raises:
        InputError: the file cannot be read or is not one of setpred's.
    """
    with open_set_file(path) as file:
        header = read_header(file, path)
        rows, checksum = read_sets(file, header, path), _attribute(file, "sha256", str)
    schema, size = header.schema, header.image_size
    present = schema.values(rows.elements, PRESENCE) > 0.5
    objects = rows.elements[present]
    source = ((key, " to ".join(map(str, v)) if isinstance(v, list) else v) for key, v in header.source.items())
    lines = [
        f"{path}: {plural(header.images, 'image')} of {size}x{size}, {plural(len(objects), 'object')}, "
        f"{Path(path).stat().st_size / 1e6:.1f} MB",
        f"schema    {schema.name}: {schema.set_dim} numbers, up to {plural(schema.max_objects, 'object')}; "
        + ", ".join([*(f"{field.name} ({field.size})" for field in schema.fields), f"{PRESENCE} (1)"]),
        "source    " + ", ".join(f"{key} {value}" for key, value in source),
        f"cameras   known for {plural(np.isfinite(rows.camera).all(1).sum(), 'image')}",
        f"sha256    {checksum}",
    ]
    counts = np.bincount(present.sum(1))
    lines += ["", "objects per image", *_bars([(str(n), count) for n, count in enumerate(counts) if count])]
    for field in schema.categorical:
        counts = np.bincount(schema.values(objects, field.name), minlength=field.size)
        lines += ["", field.name, *_bars(list(zip(field.classes, counts, strict=True)))]
    for field in schema.continuous:
        values = schema.values(objects, field.name)
        known = values[~np.isnan(values).any(-1)]
        if len(known):
            ranges = zip(known.min(0), known.max(0), strict=True)
            text = f"{field.name}: {', '.join(f'{low:.2f} to {high:.2f}' for low, high in ranges)}"
            text += f" {field.unit}" if field.unit else ""
            text += f", again after {field.period:g}" if field.period else ""
            text += f", of {len(known)} objects" if field.optional else ""
            lines += ["", text]
    return "\n".join(lines)


def _bars(counts: list[tuple[str, int]]) -> list[str]:
    """A line for each name, its count, share and bar."""
    most, total = max(n for _, n in counts) or 1, sum(n for _, n in counts) or 1
    return [f"  {name:<10} {n:>8} {n / total:>6.1%} {'#' * round(40 * n / most)}" for name, n in counts]
