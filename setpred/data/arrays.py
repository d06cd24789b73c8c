"""Import arrays: .npz files, or HDF5 files of plain arrays, with sets, vectors or images as inputs.

A file has n examples of up to N objects each, and one array for every field of an object:

    inputs       numbers [n, K]           a vector for each example; or [n, M, K], a set of vectors
    input_mask   bool [n, M]              which elements of the input sets exist; or input_sizes, integers [n]
    images       [n, H, W], [n, H, W, 3]  instead of inputs; uint8, uint16, or floats in [0, 1]; also channels first
    coords       numbers [n, N, d]        positions
    boxes        numbers [n, N, 4]        left, top, right, bottom: they become `coords` and `extent`
    NAME         numbers [n, N, d]        a field of d numbers; floats [n, N] are a field of one
    NAME         integers, text [n, N]    a field of classes
    mask         bool [n, N]              which objects exist; or sizes, integers [n]

Without a mask, an object is absent where its floats are NaN, its integers -1 or its text is empty; where one array says
so, the others must say so too, or be 0. Input sets are padded with NaN in the same way. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from setpred.data.hdf5 import FORMAT, Header, InputSets, Record, own_array
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import ArrayImage, fitted
from setpred.data.importing import checked_image_size, inferred_schema
from setpred.data.overrides import Overrides
from setpred.errors import InputError, listed, plural, reason, shown
from setpred.schema import BOX, LARGEST_SIZE, ElementSchema

SUFFIXES = (".npz", ".h5", ".hdf5")  # of files of arrays
INPUTS = ("inputs", "input_mask", "input_sizes", "images")
PRESENT = ("mask", "sizes")
MOST_BYTES = 2**32  # of the arrays of a file, unpacked
MOST_CLASSES = 256  # of a field: integers with more values are rather numbers
BLOCK = 2**18  # numbers of the inputs that are written at once
COARSE = 1e-4  # largest rounding of an input by float32, as a share of the range of its number


def read_arrays(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file or an HDF5 file, or those of some names.

    Raises:
        InputError: no such file, or neither of both; pickled objects, arrays elsewhere, more than `MOST_BYTES`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"expected an .npz or HDF5 file of arrays, but there is no file {path}")
    wanted = None if names is None else set(names)
    try:
        if zipfile.is_zipfile(path):
            return _read_npz(path, wanted)
        if h5py.is_hdf5(path):
            return _read_hdf5(path, wanted)
    except InputError:
        raise
    except Exception as error:  # of many kinds, at untrusted bytes
        raise InputError(f"{path} is cut short or damaged ({reason(error)[:200]}); copy or make it again") from error
    raise InputError(f"{path}: expected an .npz file of numpy.savez, or an HDF5 file, got other bytes")


def _read_npz(path: Path, wanted: set[str] | None) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        members = {name: info for name, info in members.items() if wanted is None or name in wanted}
        _check_bytes(path, sum(info.file_size for info in members.values()))
        for name, info in members.items():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                if version not in reads:
                    raise InputError(f"{path}, array {name!r}: expected version 1 or 2 of .npy, got {version}")
                shape, _, dtype = reads[version](file)
            if dtype.hasobject:
                raise InputError(f"{path}, array {name!r}: expected numbers or text, got pickled Python objects")
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise InputError(f"{path}, array {name!r}: is cut short; copy or make it again")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in members}


def _read_hdf5(path: Path, wanted: set[str] | None) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path, "r", locking=False) as file:
        if wanted is None and file.attrs.get("format") == FORMAT:
            raise InputError(f"{path} is a prepared file already; train on it with --data {path}")
        arrays = {name: own_array(file, name) for name in file if wanted is None or name in wanted}
        for name, stored in arrays.items():
            if stored is None:
                raise InputError(f"{path}, {name!r}: expected an array in this file, got a group or a link")
            if stored.dtype.hasobject and h5py.check_string_dtype(stored.dtype) is None:
                raise InputError(f"{path}, array {name!r}: expected numbers or text, got {stored.dtype}")
        _check_bytes(path, sum(stored.size * stored.dtype.itemsize for stored in arrays.values()))
        for name, stored in arrays.items():
            text = h5py.check_string_dtype(stored.dtype)
            found[name] = stored[()] if text is None else stored.asstr()[()].astype(str)
    return found


def _check_bytes(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise InputError(f"{path}: expected arrays of at most {MOST_BYTES:,} bytes, got {size:,}; split the file")


def input_sets(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], *, rounded: bool = True) -> np.ndarray:
    """The input sets of arrays: float32 `[n, M, K]`, padded with NaN.

    Args:
        rounded: whether float32 may round numbers coarsely, compared with their range.

    Raises:
        InputError: no `inputs`, another shape, numbers that are not finite, or coarsely rounded.
    """
    if "inputs" not in arrays:
        raise InputError(f"{path}: expected an array 'inputs', got {listed(sorted(arrays)) or 'nothing'}")
    where, values = f"{path}, array 'inputs'", arrays["inputs"]
    if values.dtype.kind not in "fiub" or values.ndim not in (2, 3) or 0 in values.shape:
        raise InputError(f"{where}: expected numbers [n, K] or [n, M, K], got {_kind(values)}")
    if max(values.shape[1:]) > LARGEST_SIZE:
        raise InputError(f"{where}: expected at most {LARGEST_SIZE} elements and numbers, got {_kind(values)}")
    values = (values[:, None] if values.ndim == 2 else values).astype(np.float64)
    absent = np.isnan(values).all(-1) if values.shape[1] > 1 else np.zeros(values.shape[:2], bool)
    given = _presence(path, arrays, ("input_mask", "input_sizes"), values.shape[:2])
    present = ~absent if given is None else given
    _check_finite(where, values, present, "element")
    single = values.astype(np.float32) if np.abs(values[present]).max(initial=0) < 1e30 else None
    if single is None:
        raise InputError(f"{where}: expected numbers under 1e30, got larger ones; scale them first")
    exact = values[present]
    if len(exact) and not rounded:
        error, span = np.abs(single[present] - exact).max(0), np.ptp(exact, axis=0)
        if (wrong := (span > 0) & (error > COARSE * span)).any():
            column = int(wrong.argmax())
            raise InputError(
                f"{where}: number {column} is from {exact[:, column].min():.12g} to {exact[:, column].max():.12g}, and "
                "single precision rounds it by more than a ten thousandth of this range; subtract its mean first"
            )
    single[~present] = np.nan
    return single


def _presence(
    path: Any, arrays: Mapping[str, np.ndarray], names: Sequence[str], shape: tuple[int, ...]
) -> np.ndarray | None:
    """The mask `shape` that one of two arrays gives: a mask or sizes; None without them."""
    if all(name in arrays for name in names):
        raise InputError(f"{path}: expected one of {names[0]!r} and {names[1]!r}, got both")
    if names[0] in arrays:
        mask = arrays[names[0]]
        if mask.shape != shape or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
            raise InputError(f"{path}, array {names[0]!r}: expected truth values {list(shape)}, got {_kind(mask)}")
        return mask.astype(bool)
    if names[1] in arrays:
        sizes = arrays[names[1]]
        if sizes.shape != shape[:1] or sizes.dtype.kind not in "iu" or ((sizes < 0) | (sizes > shape[1])).any():
            raise InputError(
                f"{path}, array {names[1]!r}: expected integers [{shape[0]}] from 0 to {shape[1]}, got {_kind(sizes)}"
            )
        return np.arange(shape[1]) < sizes[:, None]
    return None


def _kind(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"


def _check_finite(where: str, values: np.ndarray, present: np.ndarray, noun: str) -> None:
    advice = f"expected finite numbers, got {{}}; correct them, or leave the {noun} out by a mask"
    _reject(present & ~np.isfinite(values).all(-1), where, advice, values, noun)


def _reject(wrong: np.ndarray, where: str, message: str, values: np.ndarray, noun: str = "object") -> None:
    """Raise `InputError` for the first of `wrong [n, N]`; a pair of braces in the message becomes its value."""
    if wrong.any():
        example, place = (int(number[0]) for number in np.nonzero(wrong))
        message = message.format(shown(values[example, place].tolist()))
        raise InputError(f"{where}, example {example}, {noun} {place}: {message}")


@dataclass(frozen=True)
class Objects:
    """The objects of n examples: numbers `[n, N, d]` and texts of classes `[n, N]` by field, and which exist."""

    path: Any
    numbers: dict[str, np.ndarray]
    classes: dict[str, np.ndarray]
    present: np.ndarray

    @classmethod
    def of(cls, path: Any, arrays: Mapping[str, np.ndarray], count: int, optional: Collection[str] = ()) -> Objects:
        """The fields among the arrays of a file with `count` inputs; present objects may lack the `optional` ones.

        Raises:
            InputError: no field, or arrays that do not fit together.
        """
        fields = {name: values for name, values in arrays.items() if name not in (*INPUTS, *PRESENT)}
        if taken := [name for name in fields if name in ("presence", "confidence")]:
            raise InputError(f"{path}: an array cannot be named {taken[0]!r}, which has a meaning here; rename it")
        if not fields:
            raise InputError(f"{path}: expected arrays of the objects, such as 'coords' [n, N, 2], got none")
        shape = (count, next(iter(fields.values())).shape[1] if next(iter(fields.values())).ndim > 1 else 1)
        for name, values in fields.items():
            if values.ndim not in (2, 3) or values.shape[:2] != shape or 0 in values.shape:
                raise InputError(
                    f"{path}, array {name!r}: expected [{shape[0]}, {shape[1]}] or [{shape[0]}, {shape[1]}, d], with "
                    f"an axis of the examples and one of the objects, got {_kind(values)}"
                )
            if values.dtype.kind not in "fiubUS" or (values.dtype.kind in "US" and values.ndim == 3):
                raise InputError(f"{path}, array {name!r}: expected numbers, or text [n, N], got {_kind(values)}")
        numbers, classes, absent = {}, {}, []
        for name, values in fields.items():
            if values.ndim == 3 or values.dtype.kind == "f" or name in ("coords", "extent"):
                numbers[name] = values.reshape(*shape, -1).astype(np.float64)
                gone, zero = np.isnan(numbers[name]).all(-1), (numbers[name] == 0).all(-1)
            else:
                text = values.dtype.kind in "US"
                try:
                    classes[name] = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}, array {name!r}: expected text in UTF-8, got: {error}") from error
                gone, zero = values == (values.dtype.type() if text else -1), values == values.dtype.type()
            absent.append((name, gone, zero))
        present = _presence(path, arrays, PRESENT, shape)
        if present is None:
            present = ~np.any([gone for name, gone, _ in absent if name not in optional], axis=0)
            advice = "expected NaN, -1, no text or 0 as another array says that this object is absent; correct one of "
            for name, gone, zero in absent:
                where = f"{path}, array {name!r}"
                _reject(~present & ~gone & ~zero, where, f"{advice}them, or add a 'mask' [n, N]", fields[name])
        if "boxes" in numbers:
            numbers |= _centres(path, numbers, present)
            del numbers["boxes"]
        for name, values in numbers.items():
            there = present & ~np.isnan(values).all(-1) if name in optional else present
            _check_finite(f"{path}, array {name!r}", values, there, "object")
        for name, values in classes.items():
            nothing = ("", "-1", "nan", "NaN")
            _reject(present & np.isin(values, nothing), f"{path}, array {name!r}", "expected a class, got {}", values)
        if "extent" in numbers:
            narrow = present & (numbers["extent"] <= 0).any(-1)
            advice = "expected a width and height above 0, got {}"
            _reject(narrow, f"{path}, array 'extent'", advice, numbers["extent"])
        if "coords" in numbers:
            _check_repeats(path, numbers, classes, present)
        return cls(path, numbers, classes, present)

    def check_pixels(self, width: int, height: int, names: Collection[str]) -> None:
        """Raise `InputError` for a position or keypoint, a field of these, that is far outside an image."""
        if "coords" in names and self.present.any() and np.abs(self.numbers["coords"][self.present]).max() <= 1:
            raise InputError(f"{self.path}: all positions are between -1 and 1, not pixels; pass --units given")
        most = np.array([width, height])
        advice = f"expected a position in the image of {width}x{height} pixels, got {{}}; correct it, or pass --units"
        for name in (name for name in names if name != "extent"):
            values = self.numbers[name]
            outside = self.present & ((values < -most / 2) | (values > 1.5 * most)).any(-1)
            _reject(outside, f"{self.path}, array {name!r}", advice, values)

    def schema(self, side: float | None, overrides: Overrides) -> ElementSchema:
        """The inferred schema: position and extent first, then numbers and classes in the order of the file.

        Args:
            side: of images in whose pixels positions are, see `ElementSchema.side`.
            overrides: changes of it.
        """
        if not self.present.any():
            raise InputError(f"{self.path}: expected at least one object, got none; the schema cannot be inferred")
        numbers, classes = {}, {}
        for name in sorted(self.numbers, key=lambda name: (*BOX, name).index(name)):
            values = self.numbers[name][self.present]
            there = values[np.isfinite(values).all(-1)]  # optional fields may be absent
            numbers[name] = there if len(there) else np.zeros_like(values[:1])
        for name, values in self.classes.items():
            found = sorted(set(values[self.present].tolist()), key=lambda text: (_integer(text), text))
            if len(found) > MOST_CLASSES:
                raise InputError(
                    f"{self.path}, array {name!r}: expected at most {MOST_CLASSES} classes, got {len(found)}; give "
                    "numbers as floats"
                )
            classes[name] = tuple(found)
        most = max(1, int(self.present.sum(1).max()))
        choices = {"side": side, "optional": overrides.optional, "overrides": overrides, "max_objects": most}
        return inferred_schema(self.path, numbers, classes, **choices)

    def renamed(self, overrides: Overrides) -> Objects:
        """The objects with the names of fields and classes that a schema file gives."""
        classes = {}
        for name, values in self.classes.items():
            texts, place = np.unique(values, return_inverse=True)
            texts = np.array([overrides.new_classes(name).get(text, text) for text in texts.tolist()])
            classes[overrides.renamed(name)] = texts[place.reshape(values.shape)]
        return replace(
            self, numbers={overrides.renamed(name): each for name, each in self.numbers.items()}, classes=classes
        )

    def encoded(self, schema: ElementSchema, unit: float = 1.0) -> np.ndarray:
        """The elements `[n, max_objects, set_dim]` of a schema; positions in pixels are multiplied by `unit`.

        Raises:
            InputError: another field than those of the schema; an unknown class; too many objects.
        """
        ours = {name: values.shape[-1] for name, values in self.numbers.items()} | dict.fromkeys(
            self.classes, "classes"
        )
        theirs = {field.name: "classes" if field.categorical else field.numbers for field in schema.fields}
        if ours != theirs:
            wanted, got = (listed([f"{name} ({size})" for name, size in each.items()]) for each in (theirs, ours))
            raise InputError(f"{self.path}: expected the fields {wanted} as in the schema, got {got}")
        counts = self.present.sum(1)
        if counts.max() > schema.max_objects:
            raise InputError(
                f"{self.path}, example {counts.argmax()}: expected at most {plural(schema.max_objects, 'object')} as "
                f"in the schema, got {counts.max()}"
            )
        order = np.argsort(~self.present, axis=1, kind="stable")[:, : schema.max_objects]
        present = np.take_along_axis(self.present, order, 1)
        elements = np.zeros((len(present), schema.max_objects, schema.set_dim), np.float32)
        filled = elements[:, : order.shape[1]]
        for field in schema.fields:
            if field.categorical:
                places = {text: place for place, text in enumerate(field.classes)}
                values = np.take_along_axis(self.classes[field.name], order, 1)
                codes = np.array([places.get(text, -1) for text in values.ravel().tolist()]).reshape(values.shape)
                if (wrong := present & (codes < 0)).any():
                    example = int(np.nonzero(wrong)[0][0])
                    raise InputError(
                        f"{self.path}, example {example}: unknown {field.name} {shown(str(values[wrong][0]))}; "
                        f"expected one of {', '.join(field.classes)}"
                    )
                filled[..., schema.slice(field.name)] = np.eye(field.size, dtype=np.float32)[codes]
            else:
                values = np.take_along_axis(self.numbers[field.name], order[..., None], 1)
                values = values * (unit if field.name in schema.in_pixels else 1.0)
                filled[..., schema.slice(field.name)] = np.nan_to_num(field.store(values))
        filled[..., -1] = 1.0
        filled[~present] = 0.0
        return elements


def _check_repeats(
    path: Any, numbers: Mapping[str, np.ndarray], classes: Mapping[str, np.ndarray], present: np.ndarray
) -> None:
    """Raise `InputError` if an object with a position repeats another one, as padding by zeros does."""
    columns = [values.reshape(present.size, -1) for values in numbers.values()]
    columns += [np.unique(values, return_inverse=True)[1].reshape(-1, 1) for values in classes.values()]
    examples = np.repeat(np.arange(len(present)), present.shape[1])
    rows = np.nonzero(present.ravel())[0]
    every = np.concatenate([examples[:, None], *columns], axis=1)[rows]
    _, first = np.unique(every, axis=0, return_index=True)
    wrong = np.zeros(present.size, bool)
    wrong[np.delete(rows, first)] = True
    advice = "{} repeats another object; leave one of them out, or say by a 'mask' [n, N] or 'sizes' [n] which exist"
    _reject(wrong.reshape(present.shape), f"{path}, array 'coords'", advice, numbers["coords"])


def _integer(text: str) -> float:
    return int(text) if text.lstrip("-").isdecimal() else math.inf


def _centres(path: Any, numbers: Mapping[str, np.ndarray], present: np.ndarray) -> dict[str, np.ndarray]:
    """`coords` and `extent` of `boxes [n, N, 4]`."""
    boxes = numbers["boxes"]
    if boxes.shape[-1] != 4 or {"coords", "extent"} & set(numbers):
        raise InputError(f"{path}: expected 'boxes' [n, N, 4] and no 'coords' or 'extent', got {_kind(boxes)}")
    low, high = boxes[..., :2], boxes[..., 2:]
    advice = "expected left, top, right, bottom with right > left and bottom > top, got {}"
    _reject(present & (high <= low).any(-1), f"{path}, array 'boxes'", advice, boxes)
    return {"coords": (low + high) / 2, "extent": high - low}


def _pictures(path: Any, images: np.ndarray) -> np.ndarray:
    """Images uint8 `[n, H, W, 3]` of the layouts that are usual.

    Raises:
        InputError: another layout, or other numbers.
    """
    where = f"{path}, array 'images'"
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):  # as torch has them
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise InputError(f"{where}: expected [n, H, W], [n, H, W, 1 or 3] or [n, 1 or 3, H, W], got {_kind(images)}")
    if images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1:
        images = (images * 255).round().astype(np.uint8)
    elif images.dtype == np.uint16:
        images = (images // 257).astype(np.uint8)
    if images.dtype != np.uint8:
        raise InputError(f"{where}: expected uint8, uint16, or floats from 0 to 1, got {images.dtype} of other numbers")
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def array_images(path: str | os.PathLike[str]) -> list[ArrayImage]:
    """The images of a file of arrays, or of a prepared file, with their names.

    Raises:
        InputError: no array `images`, or one of another layout.
    """
    arrays = read_arrays(path, INPUTS)
    if "images" not in arrays:
        raise InputError(f"{path}: expected an array 'images', got {listed(sorted(arrays)) or 'no inputs'}")
    return [ArrayImage(path, *each) for each in enumerate(_pictures(path, arrays["images"]))]


def import_arrays(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    schema: ElementSchema | None = None,
    overrides: Overrides | None = None,
    inputs: InputSets | None = None,
    units: str | None = None,
    force: bool = False,
) -> ElementSchema:
    """Write the arrays of a file as a prepared file; return its schema. The module describes the arrays.

    Args:
        image_size: side of the stored images; 64 for images of at most 64 pixels, else 128.
        schema: of the file, instead of the inferred one: that of another file, whose classes and scales are kept.
        overrides: changes of the inferred schema; present objects may lack its optional fields, or those of `schema`.
        inputs: those of another file, whose offset and scale are kept; inferred unless given.
        units: of positions on images: "pixels" (the default), or "given", kept as they are.

    Raises:
        InputError: what is wrong with an array, with its name, example and object.
    """
    arrays = read_arrays(path)
    if ("inputs" in arrays) == ("images" in arrays):
        got = "both" if "inputs" in arrays else listed(sorted(arrays)) or "nothing"
        raise InputError(f"{path}: expected one of the arrays 'inputs' and 'images', got {got}")
    source: dict[str, Any] = {"kind": "imported", "from": Path(path).name}
    if "inputs" in arrays and units not in (None, "given"):
        raise InputError(f"{path}: positions with inputs that are sets are kept as given; leave out --units {units}")
    if "images" in arrays:
        units = units or "pixels"
        if units == "relative":
            raise InputError(f"{path}: expected --units pixels or given for arrays, got relative")
        given = _pictures(path, arrays["images"])
        height, width = given.shape[1:3]
        side, source["units"] = float(max(height, width)) if units == "pixels" else None, units
    elif image_size is not None:
        raise InputError(f"{path}: expected no --image-size for inputs that are sets, got {image_size}; leave it out")
    else:
        given, side = input_sets(path, arrays, rounded=False), None
    overrides, unit = overrides or Overrides(), 1.0
    optional = overrides.optional if schema is None else [field.name for field in schema.fields if field.optional]
    objects = Objects.of(path, arrays, len(given), optional)
    if schema is None:
        schema = objects.schema(side, overrides)
    elif "coords" in objects.numbers and (schema.side is None) != (side is None):
        raise InputError(f"{path}: the positions of the schema are in other units; pass --units given or pixels")
    elif side is not None and schema.side is not None:
        unit = schema.side / side
    if side is not None:
        objects.check_pixels(width, height, [n for n in objects.numbers if overrides.renamed(n) in schema.in_pixels])
    elements = objects.renamed(overrides).encoded(schema, unit)
    if "images" in arrays:
        image_size = checked_image_size(image_size, max(height, width))
    sets = None if "images" in arrays else _described(given, inputs)
    numbers = max(1, BLOCK // given[0].size)  # of examples in a block
    write_set_file(
        out,
        Header(len(given), image_size, schema, source, sets),
        [slice(start, start + numbers) for start in range(0, len(given), numbers)],
        partial(_records, inputs=given, elements=elements, image_size=image_size),
        producer=f"arrays, {hashlib.sha256(given.tobytes() + elements.tobytes()).hexdigest()[:16]}",
        description="importing arrays",
        force=force,
    )
    return schema


def _described(inputs: np.ndarray, known: InputSets | None) -> InputSets:
    """Sizes of input sets `[n, M, K]`, and mean and standard deviation of each number, or those that are known."""
    present = ~np.isnan(inputs[..., 0])
    sizes, found = present.sum(1), inputs[present].astype(np.float64)
    if known is not None and known.dim != inputs.shape[-1]:
        raise InputError(f"expected inputs of {known.dim} numbers as in the schema's file, got {inputs.shape[-1]}")
    if known is None and not len(found):
        raise InputError("expected at least one element in the input sets, got none")
    offset, scale = (found.mean(0), found.std(0)) if known is None else (known.offset, known.scale)
    scale = [number if number > 0 else 1.0 for number in map(float, scale)]
    return InputSets(int(sizes.min()), inputs.shape[1], tuple(map(float, offset)), tuple(scale))


def _records(
    blocks: Sequence[slice], *, inputs: np.ndarray, elements: np.ndarray, image_size: int | None
) -> list[Record]:
    def stored(row: np.ndarray) -> np.ndarray:
        return row if image_size is None else fitted(Image.fromarray(row), image_size, padded=True)

    return [
        Record(stored(inputs[row]), elements[row], np.full(3, np.nan), row)
        for block in blocks
        for row in range(*block.indices(len(inputs)))
    ]
