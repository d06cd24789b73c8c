"""Read annotations of images: CSV tables and COCO JSON.

An annotation is one row of a table: the image, then numbers and class names by column. `setpred.data.importing` makes
fields of the columns.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from setpred.errors import InputError, shown

IMAGE = ("image", "image_id", "image_name", "image_path", "filename", "file_name", "file", "path")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
SIDES = (("width", "height"), ("w", "h"))
CENTRES = (("cx", "cy"), ("x_center", "y_center"), ("x_centre", "y_centre"))  # of points and boxes alike
POSITION = {"x", "y", "z", *itertools.chain(*CORNERS, *SIDES, *CENTRES)}
TAKEN = ("coords", "extent", "presence", "confidence")  # names of what is made of the columns
CONFIDENCE = "confidence"  # a column of predictions, which annotations do not have
CLASSES = ("label", "class", "category", "type", "species", "kind", "name", "color", "colour", "shape", "material")
NUMBERS = ("id", "index", "row", "unnamed: 0", "annotation_id", "object_id")  # columns that number the rows
DELIMITERS = ",;\t|"
MOST_NUMBERED = 100  # classes that are likely to be numbered
MOST_UNREPEATED = 256  # classes of which most have one object
MOST_CLASSES = 4096  # of a column
MOST_BYTES = 2**30  # of a file of annotations


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
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # width and height that the file states
    left_out: list[str] = field(default_factory=list)  # columns that number the rows, or of confidences
    skeleton: list[tuple[str, str]] = field(default_factory=list)  # pairs of keypoints


def read_csv(path: str | os.PathLike[str], *, categorical: Sequence[str] = (), optional: Collection[str] = ()) -> Table:
    """Read one CSV file for all images, or a folder with one CSV file per image, of the same stem.

    The first line names the columns. A column `id`, `index` or without a name (as of pandas) that numbers the rows, or
    the rows of each image, is left out; so is one of confidences, as in tables of predictions. The delimiter is the one
    of comma, semicolon, tab and bar that the first line has most often. UTF-8, UTF-16 with a byte order mark and
    Windows-1252 are read.

    Args:
        categorical: columns of classes whose names are numbers.
        optional: columns of numbers in which cells may be empty; their value is None.

    Raises:
        InputError: names file, line and column of whatever cannot be understood.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.csv") if not file.name.startswith("."))
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
        needed = column not in optional or column in POSITION
        there = [row for row in kept if row.values[column] or needed]
        table.classes[column] = _numbers_or_classes(there, column, forced=column in named) if there else None
    for row in kept:
        row.values.update({name: None for name in optional if row.values.get(name) == ""})
    _check_repeats(kept)
    if path.is_dir():
        table.images = [file.stem for file in files]
    return table


def _counts(rows: Sequence[Row], column: str) -> bool:
    """Whether a column has different whole numbers in the rows of each image."""
    pairs = [(row.image, row.values[column]) for row in rows]
    return all(number.isdecimal() for _, number in pairs) and len(set(pairs)) == len(pairs)


def _read_rows(path: Path, *, image: str | None) -> tuple[list[str], list[Row]]:
    text = _decoded(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        header[:1] = [name or "unnamed: 0" for name in header[:1]]  # of pandas, which numbers the rows so
        if len(set(header)) < len(header) or not all(header):
            got = ", ".join(map(repr, header))
            raise InputError(f"{path}, line 1: expected a different name for every column, got {got}")
        named = [name for name in header if name in IMAGE]
        if image is not None and named:
            raise InputError(f"{path}, line 1: expected no column of images in a table of one image, got {named[0]!r}")
        if image is None and len(named) != 1:
            got = f"got {', '.join(named)}" if named else f"got {', '.join(map(repr, header)) or 'an empty file'}"
            raise InputError(f"{path}, line 1: expected one column of images, such as {IMAGE[0]!r}, {got}")
        columns = [name for name in header if name not in named]
        if not columns:
            what = f"columns besides {named[0]!r}" if named else "names of columns"
            raise InputError(f"{path}, line 1: expected {what}, separated by one of , ; tab |")
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
            if not text or text.lower() == "nan":
                raise InputError(
                    f"{place}: expected a class, got {text or 'nothing'}; fill it in, or leave the row out"
                )
            if not forced and column not in CLASSES and _number(text.replace(",", ".")) is not None:
                raise InputError(
                    f"{place}: expected a number or a class, got {shown(text)}; write decimals with a point, or pass "
                    f"--categorical {column}"
                )
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
    if not classes:
        return None
    found = sorted({row.values[column] for row in rows})
    if len(found) > min(MOST_CLASSES, max(MOST_UNREPEATED, len(rows) // 2)):
        raise InputError(
            f"{rows[0].where}, column {column!r}: expected classes, got {len(found)} different words in {len(rows)} "
            "rows; remove the column"
        )
    return tuple(found)


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


def read_coco(path: str | os.PathLike[str], *, optional: Collection[str] = ()) -> Table:
    """Read COCO JSON: boxes, categories, keypoints and attributes of `annotations`, for the images of `images`.

    Boxes `[x, y, width, height]` become corners; `category` is the category's name; the entries of an annotation's
    `attributes` are further columns. Regions of crowds (`iscrowd`) are left out. Keypoints `[x, y, v, ...]` have the
    names that their category gives them. One with v = 0 is absent; occluded ones (v = 1) have a place like visible
    ones. Keypoints of other categories are absent, too.

    Args:
        optional: attributes with numbers that annotations may lack; their value is None then.

    Raises:
        InputError: names the annotation that cannot be understood.
    """
    path = Path(path)
    document, names, categories = _read_document(path)
    parts, skeleton = _keypoints(document.get("categories") or [], path)
    table = Table(str(path), images=list(names.values()), skeleton=skeleton)
    if repeated := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(f"{path}: images: expected names of files that differ, got {shown(repeated[0])} twice")
    for item in document["images"]:
        if all(type(item.get(side)) is int and item[side] > 0 for side in ("width", "height")):
            table.sizes[item["file_name"]] = item["width"], item["height"]
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
            if value is None:
                continue
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
        if name in optional:
            for row in table.rows:
                row.values[name] = row.values.get(name)
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
