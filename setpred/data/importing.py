"""Import annotated images into a prepared file, with the schema that the annotations imply.

Columns become fields:

    x, y (and z)                              `coords`, the position
    xmin, ymin, xmax, ymax (or x1, y1, ...)   `coords`, the centre, and `extent`, width and height
    x, y, width, height                       the same; `xy` says whether x and y are the centre or the corner
    cx, cy, or x_center, y_center             `coords`; with width and height, the centre of a box
    angle, theta, heading, ...                a number with a period, where the values leave no doubt
    every other column                        a field with the column's name: numbers, or classes

Images keep their aspect ratio: each is padded at its right and bottom to a square, then resized. Positions and extents
in pixels follow: they are pixels of an image whose longer side is that of the largest image.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version

from setpred.data.annotations import CENTRES, CORNERS, SIDES, TAKEN, Row, Table
from setpred.data.hdf5 import Header, Record
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import REPAIR, find_images, load_image, stated_size
from setpred.data.overrides import Overrides
from setpred.errors import InputError, plural, shown
from setpred.files import LARGEST_IMAGE
from setpred.schema import BOX, LARGEST_SIZE, ElementSchema, Field, categorical, continuous, periodic

ANGLE = re.compile(r"(?:angle|theta|orientation|heading|rotation|yaw|azimuth|bearing)(?:_?(deg|rad)\w*)?")
TURNS = {"degrees": 360.0, "radians": 2 * math.pi}
MOST_BYTES = 2**32  # of the sets of a file
SMALL = 64  # pixels: images that are no larger are stored at this size, others at twice this


@dataclass(frozen=True)
class _Layout:
    """The columns with the position, and their form."""

    corners: tuple[str, ...] = ()
    position: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    centred: bool = True

    @classmethod
    def of(cls, table: Table, xy: str | None) -> _Layout:
        columns = table.classes
        for corners in CORNERS:
            if all(name in columns for name in corners):
                return cls(corners=corners)
            if len(lacking := [name for name in corners if name not in columns]) == 1:
                raise InputError(f"{table.source}: expected columns {', '.join(corners)}, got no {lacking[0]}")
        sides = next((pair for pair in SIDES if all(name in columns for name in pair)), ())
        for centre in CENTRES:
            if all(name in columns for name in centre):
                return cls(position=centre, sides=sides)
        position = tuple(name for name in ("x", "y", "z") if name in columns)
        if position and position[:2] != ("x", "y"):
            raise InputError(f"{table.source}: expected columns x and y, got {' and '.join(position)} alone")
        if sides and position == ("x", "y"):
            if xy is None:
                raise InputError(
                    f"{table.source}: x and y of a box with width and height may be its centre or its upper left "
                    "corner; pass --xy centre or --xy corner"
                )
            return cls(position=position, sides=sides, centred=xy == "centre")
        return cls(position=position)

    @property
    def columns(self) -> set[str]:
        return {*self.corners, *self.position, *self.sides}

    def boxes(self) -> bool:
        return bool(self.corners or self.sides)

    def read(self, row: Row, scale: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Position and extent of an object, each axis multiplied by `scale`."""
        if not self.columns:
            return {}
        if not self.boxes():
            return {"coords": tuple(row.values[name] * s for name, s in zip(self.position, scale, strict=False))}
        if self.corners:
            x0, y0, x1, y1 = (row.values[name] for name in self.corners)
            centre, extent = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)
        else:
            x, y = (row.values[name] for name in self.position)
            extent = tuple(row.values[name] for name in self.sides)
            centre = (x, y) if self.centred else (x + extent[0] / 2, y + extent[1] / 2)
        if min(extent) <= 0:
            raise InputError(
                f"{row.where}: expected a box with width and height above 0, got {extent[0]:g} and "
                f"{extent[1]:g}; correct it"
            )
        pairs = {"coords": centre, "extent": extent}
        return {name: (x * scale[0], y * scale[1]) for name, (x, y) in pairs.items()}


def import_images(
    table: Table,
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    schema: ElementSchema | None = None,
    overrides: Overrides | None = None,
    units: str | None = None,
    xy: str | None = None,
    workers: int = 0,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> ElementSchema:
    """Write annotated images as a prepared file; return its schema.

    Args:
        images: the folder that the names of images in the table belong to.
        image_size: side of the stored images; 64 for images of at most 64 pixels, else 128.
        schema: of the file, instead of the inferred one: that of another file, whose classes and scales are kept.
        overrides: changes of the inferred schema.
        units: of positions and extents: "pixels" of their image, "relative" to its width and height, or "given":
            kept as they are, and scaled by their range. By default pixels, but given with a coordinate z.
        xy: whether x and y are the "centre" or the "corner" of a box with width and height.
        workers: processes that decode images; 0 decodes in this one.
        say: gets a sentence about each column that might be an angle.

    Raises:
        InputError: an image that is missing or damaged; an unknown class; a set larger than the schema's.
    """
    checked_image_size(image_size, SMALL)
    paths = _match(table, Path(images))
    sizes = {name: stated_size(path, advice=REPAIR) for name, path in paths.items()}
    layout = _Layout.of(table, xy)
    if taken := [name for name in table.classes if name in TAKEN]:
        raise InputError(f"{table.source}: a column cannot be named {taken[0]!r}, which has a meaning here; rename it")
    if text := [name for name in layout.columns if table.classes[name] is not None]:
        raise InputError(f"{table.source}: expected numbers of a position in column {text[0]!r}, not classes")
    if xy is not None and not (layout.sides and layout.position == ("x", "y")):
        raise InputError(f"{table.source}: --xy: expected columns x, y, width and height with it; leave it out")
    in_space = "z" in layout.position
    if in_space and units not in (None, "given"):
        raise InputError(f"{table.source}: positions x, y and z are kept as given; leave out --units {units}")
    units = units or ("given" if in_space else "pixels")
    _check_stated(table, sizes)
    if layout.corners:
        _leave_out_sizes(table, sizes, say)
    if table.images is not None and (rest := sorted(set(find_images([images])).difference(map(str, paths.values())))):
        say(f"left out {plural(len(rest), 'image')} without annotations, such as {shown(rest[0])}")
    placed = schema is not None and schema.side is None and any(field.name == "coords" for field in schema.fields)
    if placed and layout.columns and units != "given":
        raise InputError(f"{table.source}: the positions of the schema are not in pixels; pass --units given")
    if units == "given" and schema is not None and schema.side is not None and layout.columns:
        raise InputError(f"{table.source}: the positions of the schema are in pixels; leave out --units given")
    side = (schema and schema.side) or float(max(map(max, sizes.values())))
    objects = _objects(table, layout, units, sizes, side)
    overrides = overrides or Overrides()
    if schema is None:
        schema = _inferred(table, layout, units, objects, side, overrides, say)
    elif unused := sorted(
        {name for name in table.classes if name not in layout.columns} - {f.name for f in schema.fields}
    ):
        say(f"left out {plural(len(unused), 'column')} that the schema lacks: {', '.join(unused)}")
    size = checked_image_size(image_size, max(map(max, sizes.values())))
    if (shape := (len(paths), schema.max_objects, schema.set_dim)) and math.prod(shape) * 4 > MOST_BYTES:
        raise InputError(
            f"{table.source}: {shape[0]} images of up to {shape[1]} objects of {shape[2]} numbers take "
            f"{math.prod(shape) * 4:,} bytes, expected at most {MOST_BYTES:,}; split the table, or the largest sets"
        )
    elements = np.zeros(shape, np.float32)
    for number, name in enumerate(paths):
        found = objects.get(name, [])
        if len(found) > schema.max_objects:
            raise InputError(
                f"{name}: expected at most {schema.max_objects} objects as in the schema, got {len(found)}"
            )
        for place, (row, values) in enumerate(found):
            try:
                elements[number, place] = schema.encode([overrides.applied(values)], 1)[0]
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from error

    rows = list(zip(paths.values(), elements, range(len(paths)), strict=True))
    digest = hashlib.sha256(elements.tobytes())
    for path in paths.values():
        digest.update(f"{path}{path.stat().st_size}{path.stat().st_mtime_ns}".encode())
    source = {"kind": "imported", "from": Path(table.source).name, "units": units}
    write_set_file(
        out,
        Header(len(paths), size, schema, source),
        rows,
        partial(_records, size=size),
        producer=f"pillow {pillow_version}, {digest.hexdigest()[:16]}",  # nothing is resumed from other input
        description=f"importing {size}x{size}",
        workers=workers,
        force=force,
        names=[path.name for path in paths.values()],
        keep=False,  # an image that is repaired is other input
    )
    return schema


def _records(rows: Sequence[tuple[Path, np.ndarray, int]], *, size: int) -> list[Record]:
    return [
        Record(load_image(path, size, padded=True, advice=REPAIR), element, np.full(3, np.nan), n)
        for path, element, n in rows
    ]


def _check_stated(table: Table, sizes: Mapping[str, tuple[int, int]]) -> None:
    for name, stated in table.sizes.items():
        if sizes[name] != stated:
            expected, got = ("{}x{}".format(*size) for size in (stated, sizes[name]))
            raise InputError(
                f"{table.source}: image {shown(name)}: expected {expected} pixels, as stated there, got {got}; give "
                "the images that were annotated, or correct the size"
            )


def _leave_out_sizes(table: Table, sizes: Mapping[str, tuple[int, int]], say: Callable[[str], None]) -> None:
    """Leave out columns that repeat the size of the image next to the corners of a box, as in tables of TensorFlow."""
    for pair in SIDES:
        if all(name in table.classes for name in pair) and all(
            tuple(row.values[name] for name in pair) == sizes[row.image] for row in table.rows
        ):
            say(f"left out the columns {pair[0]} and {pair[1]}, which are the size of each image")
            for name in pair:
                del table.classes[name]
                for row in table.rows:
                    del row.values[name]


def _match(table: Table, folder: Path) -> dict[str, Path]:
    """The file of each image, by the name that rows have; those without rows, too."""

    def say(sentence: str) -> None:
        if table.images is None:  # else only those listed count
            print(sentence, file=sys.stderr, flush=True)

    there = {Path(path).relative_to(folder).as_posix(): Path(path) for path in find_images([folder], say)}
    stems: dict[str, list[str]] = {}
    for name in there:
        stems.setdefault(Path(name).stem, []).append(name)
    found: dict[str, Path] = {}

    def add(name: str, where: str) -> None:
        plain = name.replace("\\", "/")
        exact = next((known for known in (plain, Path(plain).name) if known in there), None)
        matching = [exact] if exact else stems.get(plain, [])
        if len(matching) == 1:
            found[name] = there[matching[0]]
        elif not matching:
            raise InputError(f"{where}: expected an image in {folder}, got {shown(name)}, which is not there")
        else:
            raise InputError(f"{where}: expected one image of the name {name}, got {', '.join(matching)}")

    for row in table.rows:
        if row.image not in found:
            add(row.image, row.where)
    for name in table.images or ():
        if name not in found:
            add(name, table.source)
    names: dict[Path, str] = {}
    for name, path in found.items():
        if path in names:
            raise InputError(f"{table.source}: expected one name of the image {path}, got {names[path]} and {name}")
        names[path] = name
    if table.images is None:
        used = set(found.values())
        found |= {name: path for name, path in there.items() if path not in used}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _objects(
    table: Table, layout: _Layout, units: str, sizes: Mapping[str, tuple[int, int]], side: float
) -> dict[str, list[tuple[Row, dict[str, Any]]]]:
    """The objects of each image as `ElementSchema.encode` takes them."""
    found: dict[str, list[tuple[Row, dict[str, Any]]]] = {}
    if units == "pixels" and layout.columns and table.rows:
        values = [abs(row.values[name]) for row in table.rows for name in layout.columns]
        if max(values) <= 1:
            raise InputError(
                f"{table.source}: all positions are between -1 and 1; pass --units relative where they are shares of "
                "the image's width and height, else --units given"
            )
    for row in table.rows:
        width, height = sizes[row.image]
        unit = side / max(width, height)
        scale = {"pixels": (unit, unit), "relative": (unit * width, unit * height), "given": (1.0, 1.0, 1.0)}[units]
        values = layout.read(row, scale)
        keypoints = {name: at and (at[0] * scale[0], at[1] * scale[1]) for name, at in row.keypoints.items()}
        if units != "given" and layout.columns:
            for place in (values["coords"], *filter(None, keypoints.values())):
                for value, most in zip(place, (unit * width, unit * height), strict=True):
                    if not -most / 2 <= value <= 1.5 * most:
                        raise InputError(
                            f"{row.where}: expected a position in the image of {width}x{height} pixels, got "
                            f"{', '.join(f'{v / unit:g}' for v in place)}; correct it, or pass --units"
                        )
        values |= keypoints
        values |= {name: value for name, value in row.values.items() if name not in layout.columns}
        found.setdefault(row.image, []).append((row, values))
    return found


def checked_image_size(image_size: int | None, side: int) -> int:
    """The side of the stored images: that asked for, else 64 for images of a `side` of at most 64, else 128."""
    if image_size is None:
        return SMALL if side <= SMALL else 2 * SMALL
    if not 8 <= image_size <= LARGEST_IMAGE:
        raise InputError(f"expected an image size from 8 to {LARGEST_IMAGE}, got {image_size}")
    return image_size


def _inferred(
    table: Table,
    layout: _Layout,
    units: str,
    objects: Mapping[str, Sequence[tuple[Row, dict[str, Any]]]],
    side: float,
    overrides: Overrides,
    say: Callable[[str], None],
) -> ElementSchema:
    """The schema of a table: position first, then extent, numbers, keypoints, and classes, each as the columns are."""
    if not table.rows:
        raise InputError(f"{table.source}: expected at least one object, got none; the schema cannot be inferred")
    places = [*(("coords",) if layout.columns else ()), *(("extent",) if layout.boxes() else ())]
    columns = [name for name, classes in table.classes.items() if classes is None and name not in layout.columns]
    keypoints, numbers = list(table.rows[0].keypoints), {}
    for name in (*places, *columns, *keypoints):
        found = [values[name] for each in objects.values() for _, values in each if values[name] is not None]
        nothing = np.zeros((1, 2 if name in keypoints else 1))
        numbers[name] = np.array([np.atleast_1d(value) for value in found] or nothing, float)
    return inferred_schema(
        table.source,
        numbers,
        {name: classes for name, classes in table.classes.items() if classes},
        side=None if units == "given" else side,
        optional=[*keypoints, *overrides.optional],
        overrides=overrides,
        max_objects=max(map(len, objects.values())),
        skeleton=table.skeleton,
        say=say,
    )


def inferred_schema(
    source: str | os.PathLike[str],
    numbers: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[str, ...]],
    *,
    side: float | None,
    optional: Collection[str],
    overrides: Overrides,
    max_objects: int,
    skeleton: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] = print,
) -> ElementSchema:
    """The schema of objects with these values `[m, d]` and classes by field, and its overrides.

    Args:
        source: file, whose stem names the schema.
        side: of images in whose pixels positions, extents and keypoints are, see `ElementSchema.side`.
        optional: fields that objects may lack; those of two numbers are keypoints.
        max_objects: room of the sets.
        say: gets a sentence about each field that might be an angle.
    """
    overrides.check_names([*numbers, *classes])
    if max_objects > LARGEST_SIZE:
        raise InputError(f"{source}: expected sets of at most {LARGEST_SIZE} objects, got {max_objects}; split them")
    fields: list[Field] = []
    for name, values in numbers.items():
        place, may_lack = name in BOX, name in optional
        last = ("tolerance",) if place else ("tolerance", "optional")
        if side is not None and values.shape[1] == 2 and (place or may_lack):
            options = {"unit": "pixels", "scale": side / 2, "offset": 0.0 if name == "extent" else side / 2}
            options |= overrides.options(name, "unit", *last) | {"optional": may_lack}
            fields.append(continuous(name, 2, **options))
        else:
            period = ("period",) if values.shape[1] == 1 and not place else ()
            options = overrides.options(name, "unit", "scale", "offset", *period, *last)
            options.pop("optional", None)
            fields.append(number_field(name, values, may_lack, options, say))
    for name, known in classes.items():
        fields.append(categorical(name, *overrides.classes(name, known)))
    if not fields:
        raise InputError(f"{source}: expected columns of numbers or classes, got none")
    renamed = overrides.renamed
    return ElementSchema(
        overrides.name or Path(source).stem,
        [replace(made, name=renamed(made.name)) for made in fields],
        max_objects=overrides.max_objects or max_objects,
        skeleton=[(renamed(start), renamed(end)) for start, end in skeleton],
    )


def number_field(
    name: str, values: np.ndarray, optional: bool, options: dict[str, Any], say: Callable[[str], None]
) -> Field:
    """A field whose scale is the range of its values, or which has a period."""
    low, high = float(values.min()), float(values.max())
    unit = {} if optional or "period" in options or values.shape[1] > 1 else _turn(name, values)
    period = options.pop("period", TURNS[unit["unit"]] if unit else None)
    if period is not None:
        if wrong := [key for key in ("scale", "offset") if key in options] + ["optional"] * optional:
            raise InputError(f"field {name!r}: expected a period or {wrong[0]}, got both; leave one out")
        return periodic(name, period, offset=-period / 2 if low < 0 else 0.0, **(unit | options))
    if ANGLE.fullmatch(name) and "scale" not in options:
        say(
            f"{name}: a plain number from {low:g} to {high:g}; if it starts again after a turn, give its period in "
            "--schema FILE.yaml"
        )
    middle, half = (low + high) / 2, (high - low) / 2
    options = {"scale": half or max(abs(middle), 1.0), "offset": middle} | options
    if options["scale"] == options["offset"] and name == "coords":  # positions in pixels, see `ElementSchema.side`
        options["scale"] = math.nextafter(options["scale"], math.inf)
    return continuous(name, values.shape[1], optional=optional, **options)


def _turn(name: str, values: np.ndarray) -> dict[str, str]:
    """The unit of an angle that takes a full turn; nothing where name and values leave a doubt.

    Values over half a turn may be angles of things that look the same after half a turn.
    """
    found = ANGLE.fullmatch(name)
    low, high = float(values.min()), float(values.max())
    for unit, turn in TURNS.items():
        suffix = found and found[1]
        within = -turn / 2 - 1e-3 <= low and high <= (turn if low >= 0 else turn / 2) + 1e-3
        # numbers up to 6.28 could be small angles in degrees, but hardly over just the full turn
        full = high - low > (turn / 2 if unit == "degrees" or suffix else 0.9 * turn)
        fractions = unit == "degrees" or bool((values % 1).any())
        if found and (suffix is None or unit.startswith(suffix)) and within and full and fractions:
            return {"unit": unit}
    return {}
