"""Meaning of each number of an element."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from setpred.errors import InputError, shown

PRESENCE = "presence"
BOX = ("coords", "extent")  # fields of a box: its centre, its width and height
ANGLE = re.compile(r"(?:angle|theta|orientation|rotation)(?:_?(?:deg|rad)\w*)?")  # of the field that turns boxes
LABELS = ("category", "label", "class")
# attributes of fields that records leave out where they are these
_OPTIONS = {"offset": 0.0, "period": 0.0, "optional": False, "unit": "", "tolerance": math.inf}
# all pairs of 256 objects, more than a part of any configuration here has; two of these as width and length still give
# a number of weights that fits into 64 bits
LARGEST_SIZE = 2**16


@dataclass(frozen=True)
class Field:
    """One named group of numbers inside an element.

    A continuous field holds numbers v, each stored as (v - `offset`) / `scale`; `size` counts the stored numbers. There
    are two special kinds. One with a `period`, such as an angle, holds one number, stored as cos(2π v / period) and
    sin(2π v / period), so that 359 and 1 degrees are as near as 1 and 3; its values are in [offset, offset + period).
    An `optional` one, such as a keypoint, may be absent from an object: its numbers are followed by 1, or all are 0, as
    for elements that are present or absent.

    A categorical field holds one number per class (one-hot in targets, scores in predictions) and has
    `size == len(classes)`.

    Attributes:
        unit: of the numbers, for reports.
        tolerance: error of the field from which on an otherwise right prediction counts as wrong.
    """

    name: str
    size: int
    classes: tuple[str, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    period: float = 0.0
    optional: bool = False
    unit: str = ""
    tolerance: float = math.inf

    def __post_init__(self) -> None:
        if self.size < 1 or not (0 < self.scale < math.inf and math.isfinite(self.offset)):
            raise InputError(f"field {self.name!r}: expected size >= 1 and scale > 0, got {self.size}, {self.scale}")
        if self.classes and len(self.classes) != self.size:
            raise InputError(f"field {self.name!r}: expected {self.size} class names, got {len(self.classes)}")
        if not (0 <= self.period < math.inf and self.tolerance > 0):
            got = f"{self.period}, {self.tolerance}"
            raise InputError(f"field {self.name!r}: expected a period of at least 0 and a tolerance above 0, got {got}")
        if (self.period and self.size != 2) or (self.optional and self.size < 2):
            raise InputError(f"field {self.name!r}: expected 2 stored numbers of a period, more of an optional one")
        if bool(self.classes) + bool(self.period) + self.optional > 1:
            raise InputError(f"field {self.name!r}: expected classes, a period or an optional field, got several")

    @property
    def categorical(self) -> bool:
        return bool(self.classes)

    @property
    def numbers(self) -> int:
        """Count of the numbers that a value of a continuous field has."""
        return 1 if self.period else self.size - self.optional

    def read(self, stored: Any) -> Any:
        """Values `[..., numbers]` of a continuous field from stored numbers `[..., size]`; NaN where absent.

        Both are NumPy arrays or both are tensors.
        """
        tensor = hasattr(stored, "detach")
        if self.period:
            cosine, sine = stored[..., :1], stored[..., 1:]
            angle = sine.atan2(cosine) if tensor else np.arctan2(sine, cosine)
            return (angle * (self.period / (2 * math.pi)) - self.offset) % self.period + self.offset
        values = stored[..., : self.numbers] * self.scale
        values = values + self.offset if self.offset else values
        if not self.optional:
            return values
        there = stored[..., -1:] > 0.5
        return values.where(there, math.nan) if tensor else np.where(there, values, values.dtype.type(math.nan))

    def store(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `read`: float64 `[..., numbers]` to `[..., size]`."""
        if self.period:
            angle = values * (2 * math.pi / self.period)
            return np.concatenate([np.cos(angle), np.sin(angle)], -1)
        stored = (values - self.offset) / self.scale
        if not self.optional:
            return stored
        there = np.isfinite(values).all(-1, keepdims=True)
        return np.concatenate([np.where(there, stored, 0.0), there], -1)

    def wrapped(self, difference: Any) -> Any:
        """A difference of two values; with a period, the shortest way around, in [-period / 2, period / 2)."""
        return (difference + self.period / 2) % self.period - self.period / 2 if self.period else difference


def continuous(name: str, size: int, *, optional: bool = False, **options: Any) -> Field:
    """A field of `size` real numbers; `options` are attributes of `Field`."""
    return Field(name, size + optional, optional=optional, **options)


def periodic(name: str, period: float, **options: Any) -> Field:
    """A field of one number that is the same after a `period`, such as an angle.

    >>> heading = periodic("heading", 360, unit="degrees")
    >>> heading.read(heading.store(np.array([-90.0]))).tolist(), heading.wrapped(359 - 1)
    ([270.0], -2.0)
    """
    if not 0 < period < math.inf:
        raise InputError(f"field {name!r}: expected a period above 0, got {period}")
    return Field(name, 2, period=float(period), scale=period / 2, **options)


def categorical(name: str, *classes: str) -> Field:
    """A field with one number per class."""
    return Field(name, len(classes), classes=classes)


@dataclass(frozen=True)
class Calibration:
    """The confidence of a prediction: c = σ(slope (presence - ½) + offset), strictly between 0 and 1.

    Presence is what a model predicts and what every average precision ranks by. It may exceed 1. The confidence rises
    strictly with it, so no ranking changes and no ties arise. A training fits slope and offset to its validation
    predictions, so that c estimates the share of such predictions that are right
    (`setpred.metrics.fit_calibration`). The default is for models without a fit: c = ½ at a presence of ½.

    >>> Calibration().confidence(np.array([0.0, 0.5, 1.0])).round(3).tolist()
    [0.018, 0.5, 0.982]
    """

    slope: float = 8.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.slope < math.inf and math.isfinite(self.offset)):
            raise InputError(f"calibration: expected slope > 0 and a finite offset, got {self.slope}, {self.offset}")

    def confidence(self, presence: Any) -> np.ndarray:
        """Confidences, float64, of presences of any shape, an array or a tensor."""
        if hasattr(presence, "detach"):
            presence = presence.detach().cpu().double().numpy()
        score = self.slope * (np.asarray(presence, dtype=np.float64) - 0.5) + self.offset
        return np.exp(-np.logaddexp(0.0, -score))

    def to_dict(self) -> dict[str, float]:
        """Plain types only, for checkpoints."""
        return {"slope": float(self.slope), "offset": float(self.offset)}

    @classmethod
    def from_dict(cls, data: Mapping[str, float] | None) -> Calibration:
        """Inverse of `to_dict`, and the default for None; raises `InputError` for anything else."""
        if data is None:
            return cls()
        try:
            slope, offset = data["slope"], data["offset"]
            if {type(slope), type(offset)} - {int, float}:
                raise TypeError(f"expected numbers, got {shown(data)}")
            return cls(float(slope), float(offset))
        except (LookupError, TypeError, OverflowError) as error:
            raise InputError(f"not the record of a calibration: {error!r}; expected slope and offset") from error


UNCALIBRATED = Calibration()


class ElementSchema:
    """Names, slices, scales and classes of the numbers of an element; presence comes last.

    An element is the concatenation of the fields in order, then one presence number (1 = a real object,
    0 = padding; in a prediction, what `Calibration` makes a confidence of). `max_objects` is the largest set of this
    domain, the set size that files are padded to and models default to. `skeleton` has pairs of keypoints, by
    name, between which drawings have a line.

    >>> CLEVR.set_dim, CLEVR.slice("color"), CLEVR.field("size").classes
    (19, slice(5, 13, None), ('large', 'small'))
    """

    def __init__(
        self, name: str, fields: Sequence[Field], *, max_objects: int, skeleton: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.name, self.skeleton = name, tuple(skeleton)
        self.fields = tuple(fields)
        self.max_objects = max_objects
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names) or PRESENCE in names:
            raise InputError(f"schema {name!r}: field names must be unique and none {PRESENCE!r}, got {names}")
        if not names or max_objects < 1:
            raise InputError(f"schema {name!r}: expected at least one field and max_objects >= 1")
        if unknown := [end for pair in self.skeleton for end in pair if end not in names]:
            raise InputError(f"schema {name!r}: expected a skeleton between fields, got {unknown[0]!r}")
        self._slices: dict[str, slice] = {}
        start = 0
        for field in self.fields:
            self._slices[field.name] = slice(start, start + field.size)
            start += field.size
        self._slices[PRESENCE] = slice(start, start + 1)
        self.set_dim = start + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ElementSchema) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.name, self.fields, self.max_objects))

    def __repr__(self) -> str:
        return f"ElementSchema({self.name!r}, {self.set_dim} numbers, up to {self.max_objects} objects)"

    @property
    def continuous(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if not field.categorical)

    @property
    def categorical(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.categorical)

    def field(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise InputError(f"schema {self.name!r} has no field {name!r}; it has {[f.name for f in self.fields]}")

    def slice(self, name: str) -> slice:
        """Place of a field (or "presence") in the last axis of `elements`."""
        if name not in self._slices:
            raise InputError(f"schema {self.name!r} has no field {name!r}; it has {list(self._slices)}")
        return self._slices[name]

    def values(self, elements: Any, name: str) -> Any:
        """A field in its own units: real values `[..., numbers]`, class indices `[...]`, or presence `[...]`.

        `elements` is a NumPy array or a tensor `[..., set_dim]`; the result is of the same kind.
        """
        part = elements[..., self.slice(name)]
        if name == PRESENCE:
            return part[..., 0]
        field = self.field(name)
        return part.argmax(-1) if field.categorical else field.read(part)

    def encode(self, objects: Sequence[Mapping[str, Any]], set_size: int | None = None) -> np.ndarray:
        """Named objects to elements, zero-padded.

        Args:
            objects: each maps every field name to its value: a class name, real numbers, or None for an optional field.
            set_size: rows of the result; `max_objects` by default.

        Returns:
            float32 `[set_size, set_dim]`, the objects in their order, then zeros.

        Raises:
            InputError: too many objects, a missing field, an unknown class name, a value that is not finite.

        >>> cube = dict(coords=(3, 0, 1.5), material="metal", color="red", shape="cube", size="large")
        >>> CLEVR.encode([cube])[0, :5].tolist()
        [1.0, 0.0, 0.5, 0.0, 1.0]
        """
        set_size = self.max_objects if set_size is None else set_size
        if len(objects) > set_size:
            raise InputError(f"expected at most {set_size} objects in a set, got {len(objects)}")
        elements = np.zeros((set_size, self.set_dim), dtype=np.float32)
        for row, obj in zip(elements, objects, strict=False):
            for field in self.fields:
                if field.name not in obj:
                    raise InputError(f"an object lacks {field.name!r}; it has {sorted(obj)}")
                row[self._slices[field.name]] = self._encode_value(field, obj[field.name])
            row[-1] = 1.0
        return elements

    def _encode_value(self, field: Field, value: Any) -> np.ndarray:
        if field.categorical:
            if value not in field.classes:
                raise InputError(f"unknown {field.name} {shown(value)}; expected one of {', '.join(field.classes)}")
            return np.eye(field.size, dtype=np.float32)[field.classes.index(value)]
        if value is None and field.optional:
            return field.store(np.full(field.numbers, math.nan))
        try:
            # texts and truth values would pass as numbers
            given = value if isinstance(value, list | tuple) else [value]
            plain = all(type(number) not in (str, bool) for number in given)
            numbers = np.asarray(value if plain else None, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            numbers = np.empty(0)
        if numbers.shape != (field.numbers,) or not (np.abs(numbers) < 1e30).all():  # NaN, or beyond float32
            raise InputError(f"{field.name}: expected {field.numbers} finite numbers, got {shown(value)}")
        return field.store(numbers)

    def decode(
        self, elements: Any, *, threshold: float | None = None, calibration: Calibration = UNCALIBRATED
    ) -> list[dict[str, Any]]:
        """Elements `[set_size, set_dim]` to named objects, most confident first.

        Each object maps field names to a class name, or a list of real values in the field's own units, or None for an
        absent optional field, and "confidence" to a number between 0 and 1. Inverse of `encode` up to the order and the
        confidence.

        Args:
            threshold: least confidence of an object; by default a presence of one half.
            calibration: from presence to confidence.

        >>> CLEVR.decode(CLEVR.encode([dict(coords=(3, 0, .75), material="metal", color="red", shape="cube",
        ...                                 size="large")]))[0]["color"]
        'red'
        """
        if hasattr(elements, "detach"):
            elements = elements.detach().float().cpu().numpy()
        elements = np.asarray(elements)
        if elements.ndim != 2 or elements.shape[-1] != self.set_dim:
            raise ValueError(f"expected elements [set_size, {self.set_dim}], got {list(elements.shape)}")
        presence = self.values(elements, PRESENCE)
        confidence = calibration.confidence(presence)
        kept = presence >= 0.5 if threshold is None else confidence >= threshold
        objects = []
        for index in np.argsort(-presence, kind="stable"):
            if not kept[index]:
                break
            obj: dict[str, Any] = {}
            for field in self.fields:
                value = self.values(elements[index], field.name)
                if field.categorical:
                    obj[field.name] = field.classes[int(value)]
                else:
                    absent = field.optional and np.isnan(value).any()
                    obj[field.name] = None if absent else [float(v) for v in value]
            obj["confidence"] = float(confidence[index])
            objects.append(obj)
        return objects

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for files and checkpoints."""
        fields = [
            {"name": f.name, "size": f.size, "classes": list(f.classes), "scale": float(f.scale)}
            | {name: type(none)(getattr(f, name)) for name, none in _OPTIONS.items() if getattr(f, name) != none}
            for f in self.fields
        ]
        record = {"name": self.name, "max_objects": self.max_objects, "fields": fields}
        return record | ({"skeleton": [list(pair) for pair in self.skeleton]} if self.skeleton else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElementSchema:
        """Inverse of `to_dict`; raises `InputError` if the record is not one, or its sizes are over `LARGEST_SIZE`."""
        try:
            fields = [
                Field(
                    *(f["name"], f["size"], tuple(f["classes"]), float(f["scale"])),
                    **{name: type(none)(f.get(name, none)) for name, none in _OPTIONS.items()},
                )
                for f in data["fields"]
            ]
            name, max_objects = data["name"], data["max_objects"]
            skeleton = [(start, end) for start, end in data.get("skeleton", ())]
            texts = [name, *(text for f in fields for text in (f.name, *f.classes)), *sum(skeleton, ())]
            sizes = [max_objects, *(f.size for f in fields)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"expected names, got {shown(texts)}")
            # a bool is an int to Python
            if any(type(size) is not int for size in sizes) or max(max_objects, sum(sizes[1:])) > LARGEST_SIZE:
                raise TypeError(f"expected integers up to {LARGEST_SIZE}, got {shown(sizes)}")
            return cls(name, fields, max_objects=max_objects, skeleton=skeleton)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"not a schema record: {error!r}; expected name, max_objects and fields") from error

    def with_room(self, max_objects: int) -> ElementSchema:
        """The schema for sets of up to `max_objects`."""
        return ElementSchema(self.name, self.fields, max_objects=max_objects, skeleton=self.skeleton)

    @property
    def tolerances(self) -> dict[str, float]:
        """The fields with a finite `Field.tolerance`, and this."""
        return {field.name: field.tolerance for field in self.continuous if math.isfinite(field.tolerance)}

    def with_tolerances(self, tolerances: Mapping[str, float]) -> ElementSchema:
        """The schema with another `Field.tolerance` of some fields, by name.

        Raises:
            InputError: a name of no continuous field; a tolerance that is not above 0.
        """
        known = [field.name for field in self.continuous]
        if unknown := [name for name in tolerances if name not in known]:
            names = ", ".join(known) or "none here"
            raise InputError(f"tolerance (--within): expected a field of numbers ({names}), got {unknown[0]!r}")
        fields = [replace(f, tolerance=tolerances.get(f.name, f.tolerance)) for f in self.fields]
        return ElementSchema(self.name, fields, max_objects=self.max_objects, skeleton=self.skeleton)

    @property
    def side(self) -> float | None:
        """The side, in pixels, of the square image in which `coords` are places; None for other positions."""
        places = [field for field in self.continuous if field.name == "coords" and field.size == field.numbers == 2]
        return 2 * places[0].scale if places and places[0].offset == places[0].scale else None

    @property
    def keypoints(self) -> tuple[Field, ...]:
        """Optional places of an object, besides its position."""
        return tuple(field for field in self.continuous if field.optional and field.numbers == 2)

    @property
    def in_pixels(self) -> tuple[str, ...]:
        """The fields whose numbers are pixels of the image; none where the schema has no `side`."""
        names = (*BOX, *(field.name for field in self.keypoints)) if self.side else ()
        return tuple(field.name for field in self.continuous if field.name in names)

    @property
    def has_world(self) -> bool:
        """Whether elements have a place in CLEVR's world: a field "coords" of three numbers with CLEVR's scale."""
        same = [field for field in self.continuous if (field.name, field.size) == ("coords", 3)]
        return any((field.scale, field.offset) == (CLEVR.field("coords").scale, 0.0) for field in same)

    @property
    def has_boxes(self) -> bool:
        """Whether `coords` and `extent` are the centre and the sides of a box."""
        return all(
            any(field.name == name and field.size == field.numbers == 2 for field in self.continuous) for name in BOX
        )

    @property
    def label(self) -> tuple[Field, ...]:
        """The field of classes that detectors score: category, label or class; else every categorical field."""
        return next(((f,) for name in LABELS for f in self.categorical if f.name == name), self.categorical)

    @property
    def angle(self) -> Field | None:
        """The field that turns boxes, by its name (`ANGLE`); None where boxes are upright."""
        fields = (f for f in self.continuous if ANGLE.fullmatch(f.name) and f.numbers == 1 and not f.optional)
        return next(fields, None) if self.has_boxes else None

    def corners(self, obj: Mapping[str, Any]) -> np.ndarray:
        """The corners `[4, 2]` of the box of a decoded object, in the units of `coords`.

        An `angle` turns the box about its centre, from the x axis towards the y axis: clockwise on an image. It is in
        the unit of its field; without one in degrees if it reaches beyond 2π, else in radians. A negative extent, which
        no real box has, counts as 0.
        """
        half = np.maximum(obj["extent"], 0.0) / 2
        corners = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        if field := self.angle:
            beyond = abs(field.offset) + field.scale > 2 * math.pi + 1e-6
            degrees = field.unit == "degrees" or (beyond and field.unit != "radians")
            turn = math.radians(obj[field.name][0]) if degrees else obj[field.name][0]
            corners = corners @ np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
        return corners + np.asarray(obj["coords"])

    @property
    def position(self) -> tuple[Field, ...]:
        """The fields that distances are measured in: `coords` where there is one, else every continuous field.

        Fields with a period have another unit, and count only where there are no others. Optional fields never do.
        """
        always = [field for field in self.continuous if not field.optional]
        places = [field for field in always if field.name == "coords"]
        return tuple(places or [field for field in always if not field.period] or always)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Distances, in the units of `position`, at which average precision is reported: inf, scale / 3 and its halves.

        >>> CLEVR.thresholds
        (inf, 1.0, 0.5, 0.25, 0.125, 0.0625)
        """
        first = min((field.scale for field in self.position), default=3.0) / 3
        return (math.inf, *(float(f"{first / 2**halvings:.4g}") for halvings in range(5)))

    def converted(self, elements: np.ndarray, other: ElementSchema) -> np.ndarray:
        """Elements of another schema as elements of this one, which has the same fields, and classes and room for all.

        Args:
            elements: `[..., set_size, other.set_dim]`; present ones first in each set.

        Returns:
            float32 `[..., max_objects, set_dim]`.

        Raises:
            InputError: another field; a class that this schema lacks; too many objects; positions in images of
                another size, whose units differ.
        """
        advice = "import the file with --schema and a file of the schema that is wanted"
        if self == other:
            return elements
        same_names = {field.name for field in self.fields} == {field.name for field in other.fields}
        if not same_names or not all(_exchangeable(field, other.field(field.name)) for field in self.fields):
            raise InputError(f"expected elements of the same fields, got {self.differences(other)}; {advice}")
        present = elements[..., -1] > 0.5
        if (most := int(present.sum(-1).max(initial=0))) > self.max_objects:
            raise InputError(f"expected sets of at most {self.max_objects} objects, got one of {most}")
        if self.side and other.side and self.side != other.side:
            raise InputError(
                f"expected positions in images whose longer side is {self.side:g} pixels, got {other.side:g}; {advice}"
            )
        found = np.zeros((*elements.shape[:-1], self.set_dim), np.float32)
        for field in self.fields:
            theirs, to = other.field(field.name), self.slice(field.name)
            values = other.values(elements, field.name)
            if field.categorical:
                if unknown := set(theirs.classes) - set(field.classes):
                    raise InputError(
                        f"{field.name}: expected one of {', '.join(field.classes)}, got {', '.join(sorted(unknown))}; "
                        f"{advice}"
                    )
                places = np.array([field.classes.index(name) for name in theirs.classes])
                found[..., to] = np.eye(field.size, dtype=np.float32)[places[values]]
            else:
                found[..., to] = field.store(values.astype(np.float64))
        found[..., -1] = 1.0
        found[~present] = 0.0
        room = [(0, 0)] * (found.ndim - 2) + [(0, max(0, self.max_objects - found.shape[-2])), (0, 0)]
        return np.pad(found, room)[..., : self.max_objects, :]

    def differences(self, other: ElementSchema) -> str:
        """A sentence on how `other` differs, for error messages; empty if equal."""
        mine, theirs = self.to_dict(), other.to_dict()
        if mine == theirs:
            return ""
        if [f["name"] for f in mine["fields"]] != [f["name"] for f in theirs["fields"]]:
            return f"fields {[f['name'] for f in mine['fields']]} against {[f['name'] for f in theirs['fields']]}"
        for a, b in zip(mine["fields"], theirs["fields"], strict=True):
            if a != b:
                return f"field {a['name']!r}: {a} against {b}"
        return f"{mine['name']} (up to {mine['max_objects']}) against {theirs['name']} (up to {theirs['max_objects']})"


def _exchangeable(ours: Field, theirs: Field) -> bool:
    """Whether values of one field are values of the other: a small file may not show that a number has a period."""
    if ours.categorical or theirs.categorical:
        return ours.categorical and theirs.categorical
    one_period = not (ours.period and theirs.period) or ours.period == theirs.period
    return (ours.numbers, ours.optional) == (theirs.numbers, theirs.optional) and one_period


# CLEVR v1.0; coords are divided by 3, the half side of the square that objects are placed in.
# Order of fields and classes as in the published iDSPN targets (literature: Zhang et al., ICLR 2022, code).
CLEVR = ElementSchema(
    "clevr",
    [
        continuous("coords", 3, scale=3.0),
        categorical("material", "rubber", "metal"),
        categorical("color", "cyan", "blue", "yellow", "purple", "red", "green", "gray", "brown"),
        categorical("shape", "sphere", "cube", "cylinder"),
        categorical("size", "large", "small"),
    ],
    max_objects=10,
)
