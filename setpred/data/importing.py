"""Import annotated images into a prepared file: CSV tables, COCO JSON, and the schema that they imply.

An annotation is one row of a table: the image, then numbers and class names by column. Columns become fields:

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

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import __version__ as pillow_version

from setpred.data.hdf5 import Header, Record
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import REPAIR, find_images, load_image, stated_size
from setpred.data.overrides import Overrides
from setpred.errors import InputError, shown
from setpred.files import LARGEST_IMAGE
from setpred.schema import ElementSchema, Field, categorical, continuous, periodic

IMAGE = ("image", "image_id", "image_name", "image_path", "filename", "file_name", "file", "path")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
SIDES = (("width", "height"), ("w", "h"))
CENTRES = (("cx", "cy"), ("x_center", "y_center"), ("x_centre", "y_centre"))  # of points and boxes alike
POSITION = {"x", "y", "z", *itertools.chain(*CORNERS, *SIDES, *CENTRES)}
TAKEN = ("coords", "extent", "presence", "confidence")  # names of what is made of the columns
CONFIDENCE = "confidence"  # a column of predictions, which annotations do not have
CLASSES = ("label", "class", "category", "type", "species", "kind", "name", "color", "colour", "shape", "material")
NUMBERS = ("id", "index", "row", "unnamed: 0", "annotation_id", "object_id")  # columns that number the rows
ANGLE = re.compile(r"(?:angle|theta|orientation|heading|rotation|yaw|azimuth|bearing)(?:_?(deg|rad)\w*)?")
TURNS = {"degrees": 360.0, "radians": 2 * math.pi}
DELIMITERS = ",;\t|"
MOST_NUMBERED = 100  # classes that are likely to be numbered
MOST_BYTES = 2**30  # of a file of annotations
SMALL = 64  # pixels: images that are no larger are stored at this size, others at twice this


@dataclass(frozen=True)
class Row:
    """One annotated object: values by column, where the file has it, and keypoints by name, None where absent."""

    image: str
    values: dict[str, Any]
    where: str
    keypoints: dict[str, tuple[float, float] | None] = field(default_factory=dict)


@dataclass
class Table:
    """Annotations as read: the rows, the kind of every column, and images that are known to exist.

    `images` is None where the folder of images says which there are, those without a row included.
    """

    source: str
    rows: list[Row] = field(default_factory=list)
    classes: dict[str, tuple[str, ...] | None] = field(default_factory=dict)  # None for a column of numbers
    images: list[str] | None = None
    left_out: list[str] = field(default_factory=list)  # columns that number the rows, or of confidences
    skeleton: list[tuple[str, str]] = field(default_factory=list)  # pairs of keypoints


def read_csv(path: str | os.PathLike[str], *, categorical: Sequence[str] = ()) -> Table:
    """Read one CSV file for all images, or a folder with one CSV file per image, of the same stem.

    The first line names the columns. A column `id`, `index` or without a name (as of pandas) that numbers the rows, or
    the rows of each image, is left out; so is one of confidences, as in tables of predictions. The delimiter is the one
    of comma, semicolon, tab and bar that the first line has most often. UTF-8, UTF-16 with a byte order mark and
    Windows-1252 are read.

    Args:
        categorical: columns of classes whose names are numbers.

    Raises:
        InputError: names file, line and column of whatever cannot be understood.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise InputError(f"{path}: expected CSV files, one per image, got a folder without any")
        tables = [_read_rows(file, image=file.stem) for file in files]
    else:
        tables = [_read_rows(path, image=None)]
    columns = list(dict.fromkeys(name for names, _ in tables for name in names))
    for (names, _), file in zip(tables, files if path.is_dir() else [path], strict=True):
        if lacking := [name for name in columns if name not in names]:
            raise InputError(f"{file}: expected the columns {', '.join(columns)}, got no {', '.join(lacking)}")
    if unknown := [name for name in categorical if name.strip().lower() not in columns]:
        raise InputError(f"{path}: expected the columns {', '.join(columns)}, got no {', '.join(unknown)}")
    rows = [row for _, found in tables for row in found]
    named = {name.strip().lower() for name in categorical}
    numbering = [name for name in columns if name in NUMBERS and _counts(rows, name)]
    left_out = [name for name in columns if name in (*numbering, CONFIDENCE) and name not in named]
    for row in rows:
        for name in left_out:
            row.values.pop(name, None)
    columns = [name for name in columns if name not in left_out]
    kept = [row for row in rows if any(row.values.values())]  # a row with nothing but an image: it is empty
    table = Table(str(path), kept, left_out=left_out)
    for column in columns:
        table.classes[column] = _numbers_or_classes(kept, column, forced=column in named)
    _check_repeats(kept)
    if path.is_dir():
        table.images = [file.stem for file in files]
    return table


def _counts(rows: Sequence[Row], column: str) -> bool:
    """Whether a column has different whole numbers in the rows of each image."""
    pairs = [(row.image, row.values[column]) for row in rows]
    return all(number.isdecimal() for _, number in pairs) and len(set(pairs)) == len(pairs)


def _read_rows(path: Path, *, image: str | None) -> tuple[list[str], list[Row]]:
    reader = csv.reader(io.StringIO(text := _decoded(path), newline=""), delimiter=_delimiter(text))
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        header[:1] = [name or "unnamed: 0" for name in header[:1]]  # of pandas, which numbers the rows so
        if len(set(header)) < len(header) or not all(header):
            got = ", ".join(map(repr, header))
            raise InputError(f"{path}, line 1: expected a different name for every column, got {got}")
        named = [name for name in header if name in IMAGE] if image is None else []
        if image is None and len(named) != 1:
            got = f"got {', '.join(named)}" if named else f"got {', '.join(map(repr, header)) or 'an empty file'}"
            raise InputError(f"{path}, line 1: expected one column of images, such as {IMAGE[0]!r}, {got}")
        columns = [name for name in header if name not in named]
        if not columns:
            raise InputError(f"{path}, line 1: expected columns besides {named[0]!r}, separated by one of , ; tab |")
        rows = []
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise InputError(f"{where}: expected {len(header)} values as in line 1, got {len(cells)}")
            values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            name = image if image is not None else values.pop(named[0])
            if not name:
                raise InputError(f"{where}, column {named[0]!r}: expected the name of an image, got nothing")
            rows.append(Row(name, values, where))
        return columns, rows
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: expected CSV, got: {error}") from error


def _decoded(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: expected at most {MOST_BYTES:,} bytes, got {path.stat().st_size:,}; split it")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    for name in ("utf-16",) if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(name)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise InputError(f"{path}: expected text in UTF-8, UTF-16 or Windows-1252, got other bytes; convert it")


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(DELIMITERS, key=header.count)


def _numbers_or_classes(rows: Sequence[Row], column: str, *, forced: bool) -> tuple[str, ...] | None:
    """Convert the numbers of a column in place and return None, or return the sorted classes of a column of names."""
    numbers = [_number(row.values[column]) for row in rows]
    position = column in POSITION
    classes = forced or (column in CLASSES and not position) or (not position and all(n is None for n in numbers))
    for row, number in zip(rows, numbers, strict=True):
        text = row.values[column]
        place = f"{row.where}, column {column!r}"
        if classes:
            if not text:
                raise InputError(f"{place}: expected a class, got nothing; fill it in, or leave the row out")
            continue
        if number is None:
            first = next((other.where for other, n in zip(rows, numbers, strict=True) if n is not None), None)
            hint = "" if position else f"; correct it, or pass --categorical {column}"
            if _number(text.replace(",", ".")) is not None:
                hint = "; write decimals with a point"
            seen = f" as in {first}" if first else ""
            raise InputError(f"{place}: expected a number{seen}, got {shown(text) if text else 'nothing'}{hint}")
        if not math.isfinite(number):
            raise InputError(f"{place}: expected a finite number, got {text}; leave the row out")
        row.values[column] = number
    return tuple(sorted({row.values[column] for row in rows})) if classes else None


def possible_classes(table: Table) -> dict[str, int]:
    """Columns of numbers that may be numbers of classes, few and whole; with how many there are."""
    found = {}
    for column in (name for name, classes in table.classes.items() if classes is None and name not in POSITION):
        values = {row.values[column] for row in table.rows}
        few = 2 <= len(values) <= min(MOST_NUMBERED, len(table.rows) / 2)
        if few and all(float(value).is_integer() for value in values):
            found[column] = len(values)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def _check_repeats(rows: Sequence[Row]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = (row.image, *row.values.items(), *row.keypoints.items())
        if key in seen:
            raise InputError(f"{row.where}: repeats {seen[key].rpartition(', ')[2]}; leave one of them out")
        seen[key] = row.where


def read_coco(path: str | os.PathLike[str]) -> Table:
    """Read COCO JSON: boxes, categories, keypoints and attributes of `annotations`, for the images of `images`.

    Boxes `[x, y, width, height]` become corners; `category` is the category's name; the entries of an annotation's
    `attributes` are further columns. Regions of crowds (`iscrowd`) are left out. Keypoints `[x, y, v, ...]` have the
    names that their category gives them. One with v = 0 is absent; occluded ones (v = 1) have a place like visible
    ones. Keypoints of other categories are absent, too.

    Raises:
        InputError: names the annotation that cannot be understood.
    """
    path = Path(path)
    document, names, categories = _read_document(path)
    parts, skeleton = _keypoints(document.get("categories") or [], path)
    table = Table(str(path), images=list(names.values()), skeleton=skeleton)
    every = dict.fromkeys(itertools.chain(*parts.values()))
    for number, annotation in enumerate(document["annotations"]):
        where = f"{path}, annotation {number}"
        if not isinstance(annotation, dict):
            raise InputError(f"{where}: expected an object, got {shown(annotation)}")
        if annotation.get("iscrowd"):
            continue
        if not _is_in(names, annotation.get("image_id")):
            raise InputError(f"{where}: expected the id of an image, got image_id {shown(annotation.get('image_id'))}")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise InputError(f"{where}: expected bbox as four finite numbers x, y, width, height, got {shown(box)}")
        x, y, width, height = map(float, box)
        if width <= 0 or height <= 0:
            raise InputError(f"{where}: expected a box with width and height above 0, got {shown(box)}")
        values: dict[str, Any] = {"xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height}
        if categories:
            if not _is_in(categories, annotation.get("category_id")):
                found = shown(annotation.get("category_id"))
                raise InputError(f"{where}: expected the id of a category, got category_id {found}")
            values["category"] = categories[annotation["category_id"]]
        attributes = annotation.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise InputError(f"{where}: expected attributes by name, got {shown(attributes)}")
        for name, value in attributes.items():
            if name.lower() in values or not (type(value) in (str, bool) or _is_number(value)):
                got = shown({name: value})
                raise InputError(f"{where}: expected an attribute with a finite number or a name, got {got}")
            values[name.lower()] = value if type(value) in (int, float) else str(value)
        own = parts.get(annotation["category_id"], []) if categories else []
        keypoints = dict.fromkeys(every) | _places(annotation.get("keypoints"), own, where)
        if taken := [name for name in keypoints if name in (*values, *TAKEN)]:
            raise InputError(f"{where}: a keypoint cannot be named {taken[0]!r}, which has a meaning here; rename it")
        table.rows.append(Row(names[annotation["image_id"]], values, where, keypoints))
    columns = dict.fromkeys(name for row in table.rows for name in row.values)
    for name in columns:
        kinds = {isinstance(row.values.get(name), str) for row in table.rows}
        lacking = next((row.where for row in table.rows if name not in row.values), None)
        if lacking or len(kinds) > 1:
            where = lacking or str(path)
            raise InputError(f"{where}: expected a number, or a name, for {name!r} in every annotation; complete them")
        if kinds == {True}:
            table.classes[name] = tuple(sorted({row.values[name] for row in table.rows}))
            if name == "category":
                table.classes[name] = tuple(dict.fromkeys(categories.values()))
        else:
            table.classes[name] = None
    _check_repeats(table.rows)
    return table


def _read_document(path: Path) -> tuple[dict[str, Any], dict[Any, str], dict[Any, str]]:
    """A COCO file, the file names of its images and the names of its categories by their ids."""
    try:
        document = json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path}: expected COCO JSON with images and annotations, got {shown(document)}")
    names = _by_id(document["images"], "file_name", f"{path}: images")
    if not isinstance(document.get("categories") or [], list):
        raise InputError(f"{path}: expected a list of categories, got {shown(document['categories'])}")
    return document, names, _by_id(document.get("categories") or [], "name", f"{path}: categories")


class CocoIds(NamedTuple):
    """The ids that a COCO file gives to images, by file name without folders, and to categories, by name."""

    path: str
    images: dict[str, Any]
    categories: dict[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> CocoIds:
        """Read the ids of a file; raise `InputError` if it is no COCO JSON, or two ids have one name."""
        _, names, categories = _read_document(Path(path))
        images = {id_: Path(name).name for id_, name in names.items()}
        for found in (images, categories):
            if len(set(found.values())) < len(found):
                ((name, _),) = Counter(found.values()).most_common(1)
                raise InputError(f"{path}: expected one id for each name, got several for {shown(name)}")
        return cls(str(path), *({name: id_ for id_, name in found.items()} for found in (images, categories)))


def _keypoints(categories: Sequence[Any], path: Path) -> tuple[dict[Any, list[str]], list[tuple[str, str]]]:
    """The names of the keypoints of each category, by its id, and the pairs of names that skeletons connect."""
    names, skeleton = {}, {}
    for category in categories:
        where = f"{path}: category {shown(category['name'])}"
        own = category.get("keypoints") or []
        if not isinstance(own, list) or not all(isinstance(name, str) and name for name in own):
            raise InputError(f"{where}: expected keypoints as a list of names, got {shown(own)}")
        if len(set(own)) < len(own):
            raise InputError(f"{where}: expected names of keypoints that differ, got {shown(own)}")
        for pair in category.get("skeleton") or []:
            numbers = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
            if not numbers or not all(1 <= n <= len(own) for n in pair):
                raise InputError(f"{where}: expected a skeleton of pairs from 1 to {len(own)}, got {shown(pair)}")
            skeleton[own[pair[0] - 1], own[pair[1] - 1]] = None
        names[category["id"]] = own
    return names, list(skeleton)


def _places(keypoints: Any, names: Sequence[str], where: str) -> dict[str, tuple[float, float] | None]:
    """The place of each keypoint of an annotation; None for those that are not labelled."""
    if keypoints in (None, []):
        return {}
    if not names:
        raise InputError(f"{where}: expected keypoints with names in the category, got none; add them there")
    if not isinstance(keypoints, list) or len(keypoints) != 3 * len(names) or not all(map(_is_number, keypoints)):
        got = f"{len(keypoints)} values" if isinstance(keypoints, list) else shown(keypoints)
        raise InputError(f"{where}: expected keypoints as {3 * len(names)} numbers x, y, v, ..., got {got}")
    triples = zip(names, keypoints[::3], keypoints[1::3], keypoints[2::3], strict=True)
    found: dict[str, tuple[float, float] | None] = {}
    for name, x, y, visibility in triples:
        if visibility not in (0, 1, 2):
            raise InputError(f"{where}, keypoint {name!r}: expected a visibility of 0, 1 or 2, got {visibility}")
        found[name] = (float(x), float(y)) if visibility else None
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN


def _is_in(ids: Mapping[Any, str], value: Any) -> bool:
    return isinstance(value, int | str) and value in ids


def _by_id(items: Sequence[Any], key: str, where: str) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for item in items:
        if not isinstance(item, dict) or type(item.get("id")) not in (int, str) or not isinstance(item.get(key), str):
            raise InputError(f"{where}: expected an id and a {key}, got {shown(item)}")
        if item["id"] in found:
            raise InputError(f"{where}: expected ids that differ, got {shown(item['id'])} twice")
        found[item["id"]] = item[key]
    return found


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
        pairs = (centre, extent)
        return dict(
            zip(
                ("coords", "extent"), (tuple(v * s for v, s in zip(p, scale, strict=False)) for p in pairs), strict=True
            )
        )


def import_images(
    table: Table,
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    schema: ElementSchema | None = None,
    overrides: Overrides | None = None,
    units: str = "pixels",
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
            kept as they are, and scaled by their range.
        xy: whether x and y are the "centre" or the "corner" of a box with width and height.
        workers: processes that decode images; 0 decodes in this one.
        say: gets a sentence about each column that might be an angle.

    Raises:
        InputError: an image that is missing or damaged; an unknown class; a set larger than the schema's.
    """
    if image_size is not None and not 8 <= image_size <= LARGEST_IMAGE:
        raise InputError(f"expected an image size from 8 to {LARGEST_IMAGE}, got {image_size}")
    paths = _match(table, Path(images))
    sizes = {name: stated_size(path, advice=REPAIR) for name, path in paths.items()}
    layout = _Layout.of(table, xy)
    if taken := [name for name in table.classes if name in TAKEN]:
        raise InputError(f"{table.source}: a column cannot be named {taken[0]!r}, which has a meaning here; rename it")
    units = "given" if "z" in layout.position else units
    placed = schema is not None and schema.side is None and any(field.name == "coords" for field in schema.fields)
    if placed and layout.columns and units != "given":
        raise InputError(f"{table.source}: the positions of the schema are not in pixels; pass --units given")
    if units == "given" and schema is not None and schema.side is not None and layout.columns:
        raise InputError(f"{table.source}: the positions of the schema are in pixels; leave out --units given")
    side = (schema and schema.side) or float(max(map(max, sizes.values())))
    objects = _objects(table, layout, units, sizes, side)
    overrides = overrides or Overrides()
    schema = _inferred(table, layout, units, objects, side, overrides, say) if schema is None else schema
    size = (SMALL if max(map(max, sizes.values())) <= SMALL else 2 * SMALL) if image_size is None else image_size
    elements = np.zeros((len(paths), schema.max_objects, schema.set_dim), np.float32)
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
    )
    return schema


def _records(rows: Sequence[tuple[Path, np.ndarray, int]], *, size: int) -> list[Record]:
    return [
        Record(load_image(path, size, padded=True, advice=REPAIR), element, np.full(3, np.nan), n)
        for path, element, n in rows
    ]


def _match(table: Table, folder: Path) -> dict[str, Path]:
    """The file of each image, by the name that rows have; those without rows, too."""
    there = {Path(path).relative_to(folder).as_posix(): Path(path) for path in find_images([folder])}
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
    numbers = [name for name, classes in table.classes.items() if classes is None and name not in layout.columns]
    keypoints, labels = list(table.rows[0].keypoints), [name for name, classes in table.classes.items() if classes]
    overrides.check_names([*places, *numbers, *keypoints, *labels])
    fields: list[Field] = []
    for name in (*places, *numbers, *keypoints):
        optional = name in keypoints
        found = [values[name] for each in objects.values() for _, values in each if values[name] is not None]
        values = np.array([np.atleast_1d(value) for value in found] or np.zeros((1, 2)), float)
        if name not in numbers and units != "given":
            options = {"unit": "pixels"} | overrides.options(name, "unit", "tolerance")
            offset = 0.0 if name == "extent" else side / 2
            made = continuous(name, 2, optional=optional, scale=side / 2, offset=offset, **options)
        else:
            allowed = ("unit", "scale", "offset", "tolerance", *(("period",) if name in numbers else ()))
            made = _number_field(name, values, optional, overrides.options(name, *allowed), say)
        fields.append(made)
    for name in labels:
        fields.append(categorical(name, *overrides.classes(name, table.classes[name])))
    if not fields:
        raise InputError(f"{table.source}: expected columns of numbers or classes, got none")
    renamed = overrides.renamed
    return ElementSchema(
        overrides.name or Path(table.source).stem,
        [replace(made, name=renamed(made.name)) for made in fields],
        max_objects=overrides.max_objects or max(map(len, objects.values())),
        skeleton=[(renamed(start), renamed(end)) for start, end in table.skeleton],
    )


def _number_field(
    name: str, values: np.ndarray, optional: bool, options: dict[str, Any], say: Callable[[str], None]
) -> Field:
    """A field whose scale is the range of its values, or which has a period."""
    low, high = float(values.min()), float(values.max())
    unit = {} if optional or "period" in options else _turn(name, values)
    period = options.pop("period", TURNS[unit["unit"]] if unit else None)
    if period is not None:
        if wrong := {"scale", "offset"} & set(options):
            raise InputError(f"field {name!r}: expected a period or {wrong.pop()}, got both; leave one out")
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
