"""Meaning of each number of an element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from setpred.errors import InputError, shown

PRESENCE = "presence"
# all pairs of 256 objects, more than a part of any configuration here has; two of these as width and length still give
# a number of weights that fits into 64 bits
LARGEST_SIZE = 2**16
ANGLES = ("angle", "rotation", "orientation", "theta")  # names of the field that turns boxes


@dataclass(frozen=True)
class Field:
    """One named group of numbers inside an element.

    A continuous field holds `size` numbers, each (value - `offset`) / `scale`; a categorical field holds one number
    per class (one-hot in targets, scores in predictions) and has `size == len(classes)`.
    """

    name: str
    size: int
    classes: tuple[str, ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or not (0 < self.scale < math.inf and math.isfinite(self.offset)):
            raise InputError(f"field {self.name!r}: expected size >= 1 and scale > 0, got {self.size}, {self.scale}")
        if self.classes and len(self.classes) != self.size:
            raise InputError(f"field {self.name!r}: expected {self.size} class names, got {len(self.classes)}")

    @property
    def categorical(self) -> bool:
        return bool(self.classes)


def continuous(name: str, size: int, *, scale: float = 1.0, offset: float = 0.0) -> Field:
    """A field of `size` real numbers, stored as (value - `offset`) / `scale`."""
    return Field(name, size, scale=scale, offset=offset)


def categorical(name: str, *classes: str) -> Field:
    """A field with one number per class."""
    return Field(name, len(classes), classes=classes)


class ElementSchema:
    """Names, slices, scales and classes of the numbers of an element; presence comes last.

    An element is the concatenation of the fields in order, then one presence number (1 = a real object,
    0 = padding; in a prediction, the confidence). `max_objects` is the largest set of this domain, the set
    size that files are padded to and models default to.

    >>> CLEVR.set_dim, CLEVR.slice("color"), CLEVR.field("size").classes
    (19, slice(5, 13, None), ('large', 'small'))
    """

    def __init__(self, name: str, fields: Sequence[Field], *, max_objects: int) -> None:
        self.name = name
        self.fields = tuple(fields)
        self.max_objects = max_objects
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names) or PRESENCE in names:
            raise InputError(f"schema {name!r}: field names must be unique and none {PRESENCE!r}, got {names}")
        if not names or max_objects < 1:
            raise InputError(f"schema {name!r}: expected at least one field and max_objects >= 1")
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
        """A field in its own units: real values `[..., size]`, class indices `[...]`, or presence `[...]`.

        `elements` is a NumPy array or a tensor `[..., set_dim]`; the result is of the same kind.
        """
        part = elements[..., self.slice(name)]
        if name == PRESENCE:
            return part[..., 0]
        field = self.field(name)
        return part.argmax(-1) if field.categorical else _real(part, field)

    def encode(self, objects: Sequence[Mapping[str, Any]], set_size: int | None = None) -> np.ndarray:
        """Named objects to elements, zero-padded.

        Args:
            objects: each maps every field name to its value: a class name, or `size` real numbers.
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
        try:
            # texts and truth values would pass as numbers
            given = value if isinstance(value, list | tuple) else [value]
            plain = all(type(number) not in (str, bool) for number in given)
            numbers = np.asarray(value if plain else None, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            numbers = np.empty(0)
        if numbers.shape != (field.size,) or not (np.abs(numbers) < 1e30).all():  # NaN, or beyond float32
            raise InputError(f"{field.name}: expected {field.size} finite numbers, got {shown(value)}")
        return (numbers - field.offset) / field.scale

    def decode(self, elements: Any, *, threshold: float = 0.5) -> list[dict[str, Any]]:
        """Elements `[set_size, set_dim]` to named objects, most confident first.

        Each object maps field names to a class name or a list of real values in the field's own units, and
        "confidence" to the presence clipped to [0, 1]; elements under `threshold` are left out. Inverse of `encode` up
        to the order.

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
        objects = []
        for index in np.argsort(-presence, kind="stable"):
            confidence = np.clip(presence[index], 0.0, 1.0)
            if confidence < threshold:
                break
            obj: dict[str, Any] = {}
            for field in self.fields:
                value = self.values(elements[index], field.name)
                obj[field.name] = field.classes[int(value)] if field.categorical else [float(v) for v in value]
            obj["confidence"] = float(confidence)
            objects.append(obj)
        return objects

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for files and checkpoints."""
        fields = [
            {"name": f.name, "size": f.size, "classes": list(f.classes), "scale": float(f.scale)}
            | ({"offset": float(f.offset)} if f.offset else {})
            for f in self.fields
        ]
        return {"name": self.name, "max_objects": self.max_objects, "fields": fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElementSchema:
        """Inverse of `to_dict`; raises `InputError` if the record is not one, or its sizes are over `LARGEST_SIZE`."""
        try:
            fields = [
                Field(f["name"], f["size"], tuple(f["classes"]), float(f["scale"]), float(f.get("offset", 0.0)))
                for f in data["fields"]
            ]
            name, max_objects = data["name"], data["max_objects"]
            texts = [name, *(text for f in fields for text in (f.name, *f.classes))]
            sizes = [max_objects, *(f.size for f in fields)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"expected names, got {shown(texts)}")
            # a bool is an int to Python
            if any(type(size) is not int for size in sizes) or max(max_objects, sum(sizes[1:])) > LARGEST_SIZE:
                raise TypeError(f"expected integers up to {LARGEST_SIZE}, got {shown(sizes)}")
            return cls(name, fields, max_objects=max_objects)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"not a schema record: {error!r}; expected name, max_objects and fields") from error

    def with_room(self, max_objects: int) -> ElementSchema:
        """The schema for sets of up to `max_objects`."""
        return ElementSchema(self.name, self.fields, max_objects=max_objects)

    @property
    def side(self) -> float | None:
        """The side, in pixels, of the square image in which `coords` are places; None for other positions."""
        places = [field for field in self.continuous if field.name == "coords" and field.size == 2]
        return 2 * places[0].scale if places and places[0].offset == places[0].scale else None

    @property
    def has_boxes(self) -> bool:
        """Whether objects are boxes: `coords`, the centre, and `extent`, width and height, each of two numbers."""
        return {"coords", "extent"} <= {field.name for field in self.continuous if field.size == 2}

    @property
    def angle(self) -> Field | None:
        """The field that turns boxes, by its name in `ANGLES`; None where boxes are upright."""
        fields = (field for field in self.continuous if field.name in ANGLES and field.size == 1)
        return next(fields, None) if self.has_boxes else None

    @property
    def label(self) -> Field | None:
        """The field whose classes are an object's label elsewhere: `category`, `label`, `class` or the first one."""
        named = {field.name: field for field in reversed(self.categorical)}
        first = self.categorical[0] if self.categorical else None
        return next((named[name] for name in ("category", "label", "class") if name in named), first)

    def corners(self, obj: Mapping[str, Any]) -> np.ndarray:
        """The corners `[4, 2]` of the box of a decoded object, in the units of `coords`.

        An `angle` turns the box about its centre, from the x axis towards the y axis: clockwise on an image. It is in
        degrees if the field reaches beyond 2π, else in radians. A negative extent, which no real box has, counts as 0.
        """
        half = np.maximum(obj["extent"], 0.0) / 2
        corners = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        if field := self.angle:
            degrees = abs(field.offset) + field.scale > 2 * math.pi + 1e-6
            turn = math.radians(obj[field.name][0]) if degrees else obj[field.name][0]
            corners = corners @ np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
        return corners + np.asarray(obj["coords"])

    @property
    def position(self) -> tuple[Field, ...]:
        """The fields that distances are measured in: `coords` where there is one, else every continuous field."""
        return tuple(field for field in self.continuous if field.name == "coords") or self.continuous

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
        if {(f.name, f.categorical or f.size) for f in self.fields} != {
            (f.name, f.categorical or f.size) for f in other.fields
        }:
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
                found[..., to] = (values.astype(np.float64) - field.offset) / field.scale
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


def _real(part: Any, field: Field) -> Any:
    return part * field.scale + field.offset if field.offset else part * field.scale


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
