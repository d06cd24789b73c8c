"""The file format of prepared data: what is in it, opening it, checking it.

An HDF5 file of n examples with their sets (N = schema.max_objects, D = schema.set_dim):

    images    uint8   [n, S, S, 3]   square images of side S, one chunk per image; or
    inputs    float32 [n, M, K]      sets of up to M vectors of K numbers, in their units, padded with NaN
    elements  float32 [n, N, D]      as `ElementSchema.encode` writes them: present first, zero padded
    camera    float64 [n, 3]         location of the camera, NaN where unknown
    index     int64   [n]            number of the example in its source
    instances uint8   [n, S, S]      optional, one gzip chunk per image: 0 is the background, k the object of row k - 1
    names     uint8   [bytes]        optional: the names of the images, a JSON list

and the attributes `format`, `version`, `schema` and `source` (JSON), `images` (n) and `objects` (counts), `image_size`
or `inputs` (JSON of `InputSets`), `producer` (a fingerprint of what made the inputs) and `sha256` (of header and rows).
The version is 1 for images, 2 for sets as inputs and 3 for images with instances, which are the visible pixels.

The images are not compressed. On 128x128 Blender renderings LZF halves the file (full CLEVR: 3.4 GB) and makes a batch
of 128 random images ten times as slow to read (17 ms against 1.7 ms).
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from setpred.errors import InputError, listed, plural, reason, shown
from setpred.files import LARGEST_IMAGE, parse_json
from setpred.schema import LARGEST_SIZE, PRESENCE, ElementSchema

FORMAT, VERSIONS = "setpred", (1, 2, 3)  # of images; of sets as inputs; of images with instance masks
BLOCK = 256  # images per read
MOST_IMAGES = 10**8  # of a file, read or made: a slip of the finger should not fill a disk
NAMES, INSTANCES = "names", "instances"  # of arrays that need not be there
LONGEST_TEXT = 1_000_000  # characters of an attribute; schema and source of ours have a few hundred


class Record(NamedTuple):
    """One row of a file, or several with an axis in front; `image` is an input set in files of these."""

    image: np.ndarray
    elements: np.ndarray
    camera: np.ndarray
    index: int | np.ndarray
    instances: np.ndarray | None = None

    def parts(self) -> list[Any]:
        """The values of the arrays in the order of `Header.layout`."""
        return [part for part in self if part is not None]


@dataclass(frozen=True)
class InputSets:
    """Inputs that are sets of vectors: their sizes, and offset and scale of each number, which models normalise by.

    A single vector is a set of one element.
    """

    least: int  # elements of the smallest set
    most: int
    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = (self.least, self.most, self.dim)
        if (
            any(type(size) is not int for size in sizes)
            or not 0 <= self.least <= self.most
            or max(sizes) > LARGEST_SIZE
        ):
            raise InputError(f"expected input sets of 0 to {LARGEST_SIZE} elements and numbers, got {shown(sizes)}")
        finite = all(math.isfinite(number) for number in (*self.offset, *self.scale))
        if not (self.most >= 1 and len(self.scale) == self.dim >= 1 and finite and min(self.scale) > 0):
            raise InputError("expected input sets with an offset and a scale above 0 for each number of an element")

    @property
    def dim(self) -> int:
        """Numbers of an element."""
        return len(self.offset)

    @property
    def noun(self) -> str:
        """An input in one word."""
        return "vector" if self.most == self.least == 1 else "set"

    @property
    def padded(self) -> bool:
        """Whether the sets differ in size."""
        return self.least < self.most

    def __str__(self) -> str:
        numbers = plural(self.dim, "number")
        if self.noun == "vector":
            return f"of {numbers}"
        return f"of {f'{self.least} to ' if self.padded else ''}{plural(self.most, 'element')} of {numbers}"


@dataclass(frozen=True)
class Header:
    """The description of a file, known before the first row is written. `source` has plain types only.

    `images` counts the examples. These have images of side `image_size`, perhaps with `instances`, or else `inputs`.
    """

    images: int
    image_size: int | None
    schema: ElementSchema
    source: Mapping[str, Any]
    inputs: InputSets | None = None
    instances: bool = False

    @property
    def version(self) -> int:
        return VERSIONS[2 if self.instances else self.inputs is not None]

    @property
    def noun(self) -> str:
        """An input in one word."""
        return "image" if self.inputs is None else self.inputs.noun

    def __str__(self) -> str:
        size = f"of {self.image_size}x{self.image_size}" if self.inputs is None else str(self.inputs)
        return f"{plural(self.images, self.noun)} {size}{' with masks' if self.instances else ''}"

    def sizes(self) -> dict[str, Any]:
        """The attributes about the inputs."""
        own = {"image_size": self.image_size} if self.inputs is None else {"inputs": plain_json(asdict(self.inputs))}
        return {"version": self.version, "images": self.images} | own

    def to_json(self) -> str:
        return plain_json(self.sizes() | {"schema": self.schema.to_dict(), "source": dict(self.source)})

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every array; that of the inputs is the first."""
        n, side, sets = self.images, self.image_size, self.inputs
        images = {"images": ((n, side, side, 3), "|u1")}
        return {
            **(images if sets is None else {"inputs": ((n, sets.most, sets.dim), "<f4")}),
            "elements": ((n, self.schema.max_objects, self.schema.set_dim), "<f4"),
            "camera": ((n, 3), "<f8"),
            "index": ((n,), "<i8"),
            **({INSTANCES: ((n, side, side), "|u1")} if self.instances else {}),
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
            compressed, or have fewer bytes than numbers: arrays take no more memory than the file has bytes. Only
            `instances` are compressed, which take a third of the memory of `images`.
    """
    with _reading(path):
        if "format" not in file.attrs or _attribute(file, "format", str) != FORMAT:
            raise InputError(f"{path} is an HDF5 file, but not one of setpred's; make one with `setpred data`")
        if (version := _attribute(file, "version", int)) not in VERSIONS:
            raise InputError(
                f"{path} has format version {version}, this setpred reads {listed(VERSIONS)}; prepare it again"
            )
        try:
            header = _parse_header(file, version)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; copy or make it again") from error
        for name, (shape, dtype) in header.layout().items():
            if fault := _fault_of_storage(file, name, shape, np.dtype(dtype)):
                raise InputError(f"{path}: {fault}; do not trust it, copy or make it again")
    return header


def _parse_header(file: h5py.File, version: int) -> Header:
    described, source = (parse_json(_attribute(file, name, str), f"its {name}") for name in ("schema", "source"))
    if not isinstance(source, dict):
        raise InputError(f"its source is {shown(source)}, expected an object of JSON")
    schema, images = ElementSchema.from_dict(described), _attribute(file, "images", int)
    if version == VERSIONS[1]:
        if not 1 <= images <= MOST_IMAGES:
            raise InputError(f"it claims {images} sets")
        return Header(images, None, schema, source, _parse_inputs(_attribute(file, "inputs", str)))
    image_size = _attribute(file, "image_size", int)
    if not (1 <= images <= MOST_IMAGES and 1 <= image_size <= LARGEST_IMAGE):
        raise InputError(f"it claims {images} images of side {image_size}")
    return Header(images, image_size, schema, source, instances=version == VERSIONS[2])


def _parse_inputs(text: str) -> InputSets:
    found = parse_json(text, "its description of inputs")
    try:
        offset, scale = (tuple(map(float, found[name])) for name in ("offset", "scale"))
        return InputSets(found["least"], found["most"], offset, scale)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"its description of inputs is {shown(found)} ({reason(error)})") from error


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


def own_array(group: h5py.Group, name: str) -> h5py.Dataset | None:
    """The array of this name that is in the file itself; None for groups, links and arrays in other files."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return None
    found = group[name]
    return found if isinstance(found, h5py.Dataset) and not (found.is_virtual or found.external) else None


def _fault_of_storage(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """The fault of an array that has another shape or type, or is not stored in this file as it is; None without."""
    if (stored := own_array(file, name)) is None:
        return f"expected {name} as an array in this file, got none, a group or a link to elsewhere"
    if stored.shape != shape or stored.dtype != dtype:
        return f"expected {name} {list(shape)} {dtype.str}, got {list(stored.shape or ())} {stored.dtype}"
    properties = stored.id.get_create_plist()
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    if name == INSTANCES:
        alone = filters == [h5py.h5z.FILTER_DEFLATE] and stored.chunks == (1, *shape[1:])
        return None if alone else f"{name} is not compressed by gzip in one chunk per image"
    if filters:
        return f"{name} is compressed or filtered, expected neither"
    size, there, whole = math.prod(shape) * dtype.itemsize, stored.id.get_storage_size(), file.id.get_filesize()
    if there != size or size > whole:
        return f"{name} takes {size} bytes, of which it has {there}, in a file of {whole}"
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
    if file.get(NAMES, getlink=True) is None:
        return None
    with _reading(path):
        stored = own_array(file, NAMES)
        if fault := _fault_of_storage(file, NAMES, (0 if stored is None else stored.size,), np.dtype("|u1")):
            raise InputError(f"{path}: {fault}; do not trust it, copy or make it again")
        names = parse_json(file[NAMES][:].tobytes(), f"{path}: names")
    if not isinstance(names, list) or len(names) != images or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is damaged: expected the names of {images} images, got {shown(names)}; make it again")
    return names


def read_inputs(file: h5py.File, index: np.ndarray) -> np.ndarray:
    """Read the images, or the input sets padded with NaN, of these numbers, in this order.

    One by one in the file's order: HDF5's own selection takes 383 ms for a batch of 128 random images, this 1.7 ms.

    Raises:
        InputError: an input set with a number that is not finite.
    """
    if "images" in file:
        stored = file["images"]
        images = np.empty((len(index), *stored.shape[1:]), dtype=np.uint8)
        for position in np.argsort(index, kind="stable"):
            images[position] = stored[index[position]]
        return images
    stored, positions = file["inputs"], np.argsort(index, kind="stable")
    inputs = np.empty((len(index), *stored.shape[1:]), dtype=np.float32)
    ends = np.flatnonzero(np.diff(index[positions]) != 1) + 1
    for run in filter(len, np.split(positions, ends)):  # rows that follow each other, in one read
        inputs[run] = stored[index[run[0]] : index[run[-1]] + 1]
    absent = np.isnan(inputs)
    if (wrong := (np.isinf(inputs) | (absent != absent[..., :1])).any((1, 2))).any():
        raise InputError(f"the input of example {index[wrong.argmax()]} has numbers that are not finite; make it again")
    return inputs


def read_instances(file: h5py.File, index: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Read the instances uint8 `[batch, S, S]` of these numbers, whose sets have `counts` `[batch]` objects.

    Chunks are decompressed here: HDF5's filter takes as much memory as a chunk asks for, this that of one mask.

    Raises:
        InputError: a mask that is damaged, of another size, or with an object that its set does not have.
    """
    stored = file[INSTANCES]
    size = math.prod(stored.shape[1:])
    instances = np.empty((len(index), *stored.shape[1:]), dtype=np.uint8)
    room = np.empty(2 * size + 64, np.uint8)  # gzip adds a thousandth at most
    for position in np.argsort(index, kind="stable"):
        number = int(index[position])
        unpacking = zlib.decompressobj()
        try:  # to ask for the size of a chunk first takes time for each chunk of the file
            skipped, content = stored.id.read_direct_chunk((number, 0, 0), out=room)
        except ValueError:  # there is none, or a larger one
            skipped, content = True, b""
        if not skipped:
            try:
                content = unpacking.decompress(content, size + 1)
            except zlib.error as error:
                raise InputError(f"the mask of image {number} is damaged ({error}); copy or make it again") from error
        if len(content) != size or not (skipped or unpacking.eof):
            raise InputError(f"the mask of image {number} does not have {size} pixels; do not trust it, make it again")
        instances[position] = np.frombuffer(content, np.uint8).reshape(instances.shape[1:])
        if (most := instances[position].max()) > counts[position]:
            raise InputError(
                f"the mask of image {number} has object {most}, but the set has only {counts[position]}; make it again"
            )
    return instances


class Checksum:
    """SHA-256 over the header, then the row of every array but `names` of each example in order, and `names` if any."""

    def __init__(self, header: Header) -> None:
        self._hash = hashlib.sha256(header.to_json().encode())
        self._types = [dtype for _, dtype in header.layout().values()]

    def update(self, *parts: np.ndarray) -> None:
        for row in zip(*parts, strict=True):
            for part, dtype in zip(row, self._types, strict=True):
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
        counts = set_sizes(rows.elements, header.schema)
        with _reading(path):
            for start in range(0, header.images, BLOCK):
                some = slice(start, min(start + BLOCK, header.images))
                index = np.arange(some.start, some.stop)
                instances = [read_instances(file, index, counts[some])] if header.instances else []
                checksum.update(read_inputs(file, index), *(part[some] for part in rows), *instances)
            checksum.update_names(pack_names(read_names(file, header.images, path)))
            objects, digest = _attribute(file, "objects", int), _attribute(file, "sha256", str)
    if checksum.hexdigest() != digest or counts.sum() != objects:
        raise InputError(f"{path}: the content is not what was written (SHA-256 differs); copy or make it again")
    return header


def stated_digest(path: str | os.PathLike[str]) -> str | None:
    """The SHA-256 that a prepared file states of its content; None of a folder, or if there is no such file."""
    if not os.path.isfile(path):
        return None
    with open_set_file(path) as file, _reading(path):
        return _attribute(file, "sha256", str)


def set_sizes(elements: np.ndarray, schema: ElementSchema) -> np.ndarray:
    """Count the present elements `[n]` of `elements [n, N, D]`."""
    return (schema.values(elements, PRESENCE) > 0.5).sum(1)


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
        with _reading(path):
            masks = [_describe_instances(file, set_sizes(rows.elements, header.schema))] if header.instances else []
    schema = header.schema
    present = schema.values(rows.elements, PRESENCE) > 0.5
    objects = rows.elements[present]
    known = int(np.isfinite(rows.camera).all(1).sum())
    source = ((key, " to ".join(map(str, v)) if isinstance(v, list) else v) for key, v in header.source.items())
    lines = [
        f"{path}: {header}, {plural(len(objects), 'object')}, {Path(path).stat().st_size / 1e6:.1f} MB",
        f"schema    {schema.name}: {schema.set_dim} numbers, up to {plural(schema.max_objects, 'object')}; "
        + ", ".join([*(f"{field.name} ({field.size})" for field in schema.fields), f"{PRESENCE} (1)"]),
        "source    " + ", ".join(f"{key} {value}" for key, value in source),
        *([f"cameras   known for {plural(known, 'image')}"] if known else []),
        *masks,
        f"sha256    {checksum}",
    ]
    counts = np.bincount(present.sum(1))
    lines += ["", f"objects per {header.noun}", *_bars([(str(n), count) for n, count in enumerate(counts) if count])]
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


def _describe_instances(file: h5py.File, counts: np.ndarray) -> str:
    """Say how many pixels background and objects take in the masks."""
    areas = np.zeros((len(counts), counts.max(initial=0) + 1), np.int64)
    for start in range(0, len(counts), BLOCK):
        index = np.arange(start, min(start + BLOCK, len(counts)))
        for row, mask in zip(index, read_instances(file, index, counts[index]), strict=True):
            areas[row] = np.bincount(mask.ravel(), minlength=areas.shape[1])
    objects = areas[:, 1:][np.arange(areas.shape[1] - 1) < counts[:, None]]
    text = f"masks     background {areas[:, 0].sum() / areas.sum():.1%}"
    if len(seen := objects[objects > 0]):
        text += f"; pixels of an object {seen.min()} to {seen.max()}, median {np.median(seen):g}"
    hidden = len(objects) - len(seen)
    return text + (f"; {plural(hidden, 'object')} without a visible pixel" if hidden else "")


def _bars(counts: list[tuple[str, int]]) -> list[str]:
    """A line for each name, its count, share and bar."""
    most, total = max(n for _, n in counts) or 1, sum(n for _, n in counts) or 1
    return [f"  {name:<10} {n:>8} {n / total:>6.1%} {'#' * round(40 * n / most)}" for name, n in counts]
