"""Predictions in the formats of other tools: CSV, COCO JSON and its masks, supervision, FiftyOne.

Counterpart of `setpred.data.importing`. Objects are those of `ElementSchema.decode`: dictionaries of fields.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from setpred.data.annotations import CocoIds
from setpred.data.images import pixel_size
from setpred.errors import InputError
from setpred.schema import BOX, ElementSchema, Field

if TYPE_CHECKING:
    import fiftyone
    import supervision

Objects = Sequence[Mapping[str, Any]]
Found = Iterable[tuple[str | int, Objects]]  # the path of an image, or the number of an input set, and its objects
FORMATS = ("json", "jsonl", "csv", "coco")
UNLABELLED = "object"  # the category of objects without classes
SEGMENT = "segment"  # entry of an object with its mask
OF_LABELS = (  # fields of FiftyOne's labels
    *("label", "id", "tags", "index", "mask", "mask_path", "points", "closed", "filled", "bounding_box", "instance"),
    "attributes",
)


def to_json(found: Found, name: str = "objects") -> Iterator[str]:
    """A list of `{"image": path, "objects": [...]}` in pieces; of input sets with their `index`.

    `name` is the key of the objects.
    """
    separator = "[\n"
    for record in _records(found, name):
        yield separator + record
        separator = ",\n"
    yield "\n]\n" if separator == ",\n" else "[\n]\n"


def to_jsonl(found: Found, name: str = "objects") -> Iterator[str]:
    """`{"image": path, "objects": [...]}` in a line for each image; arguments as of `to_json`."""
    yield from (record + "\n" for record in _records(found, name))


def _records(found: Found, name: str) -> Iterator[str]:
    for image, objects in found:  # escaped to ASCII: file names need not be UTF-8
        key = "image" if isinstance(image, str) else "index"
        yield json.dumps({key: image, name: objects}, allow_nan=False)


def to_segment(labels: np.ndarray, label: int) -> dict[str, Any]:
    """The pixels of a label as COCO's uncompressed RLE, their bounding box and number.

    `{"label", "segmentation": {"size": [h, w], "counts": [...]}, "bbox": [x, y, width, height], "area"}`. The counts
    are lengths of runs, column by column, of other pixels and pixels of the label in turn. A label without pixels has
    a box of zeros.

    Args:
        labels: integers `[h, w]`.

    >>> to_segment(np.array([[0, 2], [0, 2]]), 2)["segmentation"]
    {'size': [2, 2], 'counts': [2, 2]}
    """
    mask = labels == label
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff([0, *ends, pixels.size]).tolist()
    columns, rows = (np.flatnonzero(mask.any(axis)).tolist() for axis in (0, 1))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1] if columns else [0, 0, 0, 0]
    return {
        "label": label,
        "segmentation": {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts},
        "bbox": box,
        "area": int(mask.sum()),
    }


def csv_columns(schema: ElementSchema) -> list[str]:
    """Name the columns of a table of objects, as `setpred data import` reads them, and the confidence.

    Raises:
        InputError: two columns of one name.
    """
    boxes, names = schema.has_boxes, ["image"]
    for field in schema.fields:
        if field.name == "coords" and field.size in (2, 3):
            names += ("cx", "cy") if boxes else ("x", "y", "z")[: field.size]
        elif field.name == "extent" and boxes:
            names += ("width", "height")
        else:
            count = 1 if field.categorical else field.numbers
            names += [field.name] if count == 1 else [f"{field.name}_{number + 1}" for number in range(count)]
    names.append("confidence")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"expected fields that give different columns of CSV, got {min(twice)} twice; choose json")
    return names


def to_csv(found: Found, schema: ElementSchema, key: str = "image") -> Iterator[str]:
    """A table in pieces: a row for each object; an image without objects has a row with its name alone.

    `key` is the name of the first column.
    """
    columns = [key, *csv_columns(schema)[1:]]
    yield _line(columns)
    for image, objects in found:
        if not objects:
            yield _line([image, *[""] * (len(columns) - 1)])
        for obj in objects:
            cells = [_cells(obj[field.name], field) for field in schema.fields]
            yield _line([image, *itertools.chain(*cells), _number(obj["confidence"])])


def _cells(value: Any, field: Field) -> list[Any]:
    """The cells of a value; empty ones of an absent optional field."""
    if field.categorical:
        return [value]
    return [""] * field.numbers if value is None else [_number(v) for v in value]


def _line(cells: Iterable[Any]) -> str:
    csv.writer(line := io.StringIO(), lineterminator="\n").writerow(cells)
    return line.getvalue()


def _number(value: float) -> float:
    """A number to the digits that float32 has."""
    return float(f"{value:.7g}")


def check_coco(schema: ElementSchema, paths: Sequence[str], ids: CocoIds | None) -> None:
    """Raise `InputError` unless predictions of this schema are boxes in pixels, with the ids of other annotations."""
    if not (schema.side and schema.has_boxes):
        raise InputError(
            f"expected boxes in pixels, 'coords' and 'extent', for COCO, got the fields "
            f"{', '.join(field.name for field in schema.fields)}; choose json, jsonl or csv"
        )
    if ids is not None:
        for path in paths:
            if Path(path).name not in ids.images:
                raise InputError(f"{ids.path}: expected all images to have an id, got none of {Path(path).name}")
        for name in _classes(schema):
            if name not in ids.categories:
                raise InputError(f"{ids.path}: expected a category for each class, got none named {name!r}")


def to_coco(found: Found, schema: ElementSchema, paths: Sequence[str], ids: CocoIds | None = None) -> Iterator[str]:
    """COCO JSON in pieces.

    Without `ids` a complete file, which tools for annotations open and `setpred data import` reads: images, numbered
    from 1, with `file_name` relative to the folder that holds all `paths`; categories, numbered from 1 as in the
    schema; annotations with `score` and, for fields besides box and label, `attributes`. With the ids of an annotated
    file, the list of results that evaluations against that file read: `image_id`, `category_id`, `bbox`, `score`.

    Turned boxes also have their corners as `segmentation`; `bbox` is their upright bounding box. Objects with a mask
    have it as `segmentation` instead, and its `area`.
    """
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    images: list[dict[str, Any]] = []
    categories = {name: number + 1 for number, name in enumerate(_classes(schema))} if ids is None else ids.categories
    count, separator = 0, '{"annotations": [\n' if ids is None else "[\n"
    for image, objects in found:
        if ids is None:
            width, height = pixel_size(image)
            name = Path(os.path.relpath(os.path.abspath(image), root)).as_posix()
            images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        image_id = len(images) if ids is None else ids.images[Path(image).name]
        for obj in objects:
            count += 1
            category = categories[_class(obj, schema)]
            result = {"image_id": image_id, "category_id": category, **_boxed(obj, schema)}
            if ids is None:
                area = _number(float(np.prod(np.maximum(obj["extent"], 0))))
                result |= {"id": count, "area": area, "iscrowd": 0, "attributes": _attributes(obj, schema)}
            if SEGMENT in obj:
                result |= {name: obj[SEGMENT][name] for name in ("segmentation", "area")}
            yield separator + json.dumps(result, allow_nan=False)
            separator = ",\n"
    end = "\n]" if count else separator + "]"
    if ids is None:
        parts = [field.name for field in schema.keypoints]
        skeleton = [[parts.index(name) + 1 for name in pair] for pair in schema.skeleton if {*pair} <= {*parts}]
        more = {"keypoints": parts, "skeleton": skeleton} if parts else {}
        listed = [{"id": number, "name": name} | more for name, number in categories.items()]
        end += f',\n"images": {json.dumps(images)},\n"categories": {json.dumps(listed)}}}'
    yield end + "\n"


def _boxed(obj: Mapping[str, Any], schema: ElementSchema) -> dict[str, Any]:
    corners = schema.corners(obj)
    low, size = corners.min(0), np.ptp(corners, axis=0)
    box = {"bbox": [_number(v) for v in (*low, *size)], "score": obj["confidence"]}
    if schema.angle:
        box["segmentation"] = [[_number(v) for v in corners.flat]]
    if schema.keypoints:
        triples = ((*map(_number, obj[f.name]), 2) if obj[f.name] else (0, 0, 0) for f in schema.keypoints)
        box["keypoints"] = list(itertools.chain(*triples))
    return box


def _classes(schema: ElementSchema) -> tuple[str, ...]:
    """The classes of the label: the first field of classes that detectors score."""
    return schema.label[0].classes if schema.label else (UNLABELLED,)


def _class(obj: Mapping[str, Any], schema: ElementSchema) -> str:
    return obj[schema.label[0].name] if schema.label else UNLABELLED


def _attributes(obj: Mapping[str, Any], schema: ElementSchema) -> dict[str, Any]:
    """Fields besides position, keypoints and label; single numbers without their list."""
    known = {"coords", "extent", "confidence", SEGMENT, *(f.name for f in (*schema.keypoints, *schema.label[:1]))}
    kept = {name: value for name, value in obj.items() if name not in known}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in kept.items()}


def to_supervision(objects: Objects, schema: ElementSchema) -> supervision.Detections:
    """Objects as `supervision.Detections`, for its annotators, zones and trackers.

    `class_id` counts the classes of the first field of `schema.label`. `data` has "class_name", the other fields, and
    the corners of turned boxes, as supervision's annotator of oriented boxes wants. Points are boxes without an area.

    Args:
        objects: in pixels of the image, as `setpred predict` writes them.

    Raises:
        InputError: objects without places on the image; supervision is not installed.
    """
    supervision = _module("supervision")
    corners = _corners(objects, schema)
    data: dict[str, Any] = {}
    for field in schema.fields:
        if field.name in BOX or field in schema.label[:1]:
            continue
        absent = [math.nan] * field.numbers
        values = [absent if obj[field.name] is None else obj[field.name] for obj in objects]
        plain = field.categorical or field.numbers == 1
        data[field.name] = np.reshape(values, (len(objects), *(() if plain else (field.numbers,))))
    names = [_class(obj, schema) for obj in objects]
    if schema.angle:
        data["xyxyxyxy"] = corners.astype(np.float32)
    return supervision.Detections(
        xyxy=np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32),
        confidence=np.array([obj["confidence"] for obj in objects], np.float32),
        class_id=np.array([_classes(schema).index(name) for name in names], int),
        data=data | {"class_name": np.array(names, dtype=str)},
    )


def to_fiftyone(objects: Objects, schema: ElementSchema, size: tuple[int, int]) -> fiftyone.Label:
    """Objects as FiftyOne's labels: `Detections` of boxes, `Polylines` of turned boxes, `Keypoints` of points.

    Positions are shares of the image; fields besides position and label are attributes.

    Args:
        objects: in pixels of the image, as `setpred predict` writes them.
        size: width and height of the image.

    Raises:
        InputError: objects without places on the image; FiftyOne is not installed.
    """
    fiftyone = _module("fiftyone")
    labels = []
    for obj, corners in zip(objects, _corners(objects, schema) / size, strict=True):
        name = _class(obj, schema)
        given = _attributes(obj, schema)
        given |= {f.name: np.divide(obj[f.name], size).tolist() for f in schema.keypoints if obj[f.name]}
        known = {f"{key}_" if key in OF_LABELS else key: value for key, value in given.items()} | {"label": name}
        if schema.angle:
            points = [[tuple(corner) for corner in corners.tolist()]]
            label = fiftyone.Polyline(points=points, closed=True, confidence=obj["confidence"], **known)
        elif schema.has_boxes:
            box = [*corners.min(0).tolist(), *np.ptp(corners, axis=0).tolist()]
            label = fiftyone.Detection(bounding_box=box, confidence=obj["confidence"], **known)
        else:
            label = fiftyone.Keypoint(points=[tuple(corners[0].tolist())], confidence=[obj["confidence"]], **known)
        labels.append(label)
    if schema.angle:
        return fiftyone.Polylines(polylines=labels)
    return fiftyone.Detections(detections=labels) if schema.has_boxes else fiftyone.Keypoints(keypoints=labels)


def _corners(objects: Objects, schema: ElementSchema) -> np.ndarray:
    """Corners `[objects, 4, 2]`; those of a point coincide."""
    if not schema.side:
        names = ", ".join(field.name for field in schema.fields)
        raise InputError(f"expected objects with 'coords' in pixels of an image, got the fields {names}")
    points = [schema.corners(obj) if schema.has_boxes else np.tile(obj["coords"], (4, 1)) for obj in objects]
    return np.array(points, np.float64).reshape(-1, 4, 2)


def _module(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"expected {name} to be installed, got no module of this name; pip install {name}") from error
