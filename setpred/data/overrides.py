"""Overrides of an inferred schema, from the YAML file of `setpred data import --schema FILE.yaml`.

    name: nuclei
    max_objects: 60
    fields:
      label: {name: kind, classes: [disc, square]}   # or classes: {1: disc, 2: square}, which renames them
      radius: {unit: µm, scale: 5, offset: 10}
      angle: {period: 180, unit: degrees}            # or period: null, for a plain number
      depth: {optional: true}                        # objects may lack it: empty cells of tables, NaN in arrays

Keys of `fields` are the names that an import infers. Everything else stays as inferred.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from setpred.errors import InputError, shown
from setpred.schema import LARGEST_SIZE

OPTIONS = ("name", "classes", "unit", "scale", "offset", "period", "tolerance", "optional")  # of a field


@dataclass(frozen=True)
class Overrides:
    """The content of a schema file; empty without one.

    Attributes:
        where: the file, for messages.
        fields: options by the inferred name of a field.
    """

    where: str = ""
    name: str | None = None
    max_objects: int | None = None
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> Overrides:
        """Check the content of a schema file; raises `InputError` for unknown keys and values of other kinds."""
        _check_keys(content, ("name", "max_objects", "fields"), where)
        if not isinstance(content.get("name", ""), str):
            raise InputError(f"{where}, name: expected text, got {shown(content['name'])}")
        most = content.get("max_objects", 1)
        if type(most) is not int or not 1 <= most <= LARGEST_SIZE:
            raise InputError(f"{where}, max_objects: expected an integer from 1 to {LARGEST_SIZE}, got {shown(most)}")
        fields = content.get("fields") or {}
        if not isinstance(fields, Mapping):
            raise InputError(f"{where}, fields: expected options by the name of a field, got {shown(fields)}")
        for name, options in fields.items():
            place = f"{where}, field {name!r}"
            if not isinstance(options, Mapping):
                raise InputError(f"{place}: expected some of {', '.join(OPTIONS)}, got {shown(options)}")
            _check_keys(options, OPTIONS, place)
            for key, value in options.items():
                _check_option(key, value, f"{place}, {key}")
        return cls(where, content.get("name"), content.get("max_objects"), fields)

    @property
    def optional(self) -> tuple[str, ...]:
        """The inferred names of fields that objects may lack."""
        return tuple(name for name, options in self.fields.items() if options.get("optional"))

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `InputError` unless all overridden fields are among the inferred names."""
        if unknown := [name for name in self.fields if name not in names]:
            raise InputError(f"{self.where}: expected some of the fields {', '.join(names)}, got {shown(unknown[0])}")

    def options(self, name: str, *allowed: str) -> dict[str, Any]:
        """The options of an inferred field besides its name; `InputError` if one is not among `allowed`."""
        options = {key: value for key, value in self.fields.get(name, {}).items() if key != "name"}
        if wrong := [key for key in options if key not in allowed]:
            raise InputError(
                f"{self.where}, field {name!r}: expected options {', '.join(('name', *allowed))} for it, got {wrong[0]}"
            )
        return options

    def renamed(self, name: str) -> str:
        """The name of an inferred field in the file to be written."""
        return self.fields.get(name, {}).get("name", name)

    def classes(self, name: str, inferred: tuple[str, ...]) -> tuple[str, ...]:
        """The classes of an inferred field, in their order; `InputError` if a renaming lacks one."""
        given = self.options(name, "classes").get("classes")
        if given is None:
            return inferred
        if not isinstance(given, Mapping):
            return tuple(map(str, given))
        if lacking := [each for each in inferred if each not in {str(old) for old in given}]:
            raise InputError(f"{self.where}, field {name!r}: expected a new name of every class, got none of {lacking}")
        return tuple(dict.fromkeys(map(str, given.values())))

    def new_classes(self, name: str) -> dict[str, str]:
        """New names of classes of an inferred field by the old ones; empty unless some are renamed."""
        given = self.fields.get(name, {}).get("classes")
        return {str(old): str(new) for old, new in given.items()} if isinstance(given, Mapping) else {}

    def applied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """An object with the new names of its fields and classes."""
        found = {}
        for name, value in values.items():
            found[self.renamed(name)] = self.new_classes(name).get(value, value) if isinstance(value, str) else value
        return found


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{where}: expected some of {', '.join(known)}, got {shown(unknown[0])}")


def _check_option(key: str, value: Any, where: str) -> None:
    if key in ("name", "unit"):
        if not isinstance(value, str) or (key == "name" and not value):
            raise InputError(f"{where}: expected text, got {shown(value)}")
    elif key == "optional":
        if type(value) is not bool:
            raise InputError(f"{where}: expected true or false, got {shown(value)}")
    elif key == "classes":
        names = [*value, *value.values()] if isinstance(value, Mapping) else value
        if not isinstance(names, list) or not names or any(type(each) not in (str, int) for each in names):
            raise InputError(f"{where}: expected a list of names, or new names by old ones, got {shown(value)}")
        if not isinstance(value, Mapping) and len(set(map(str, names))) < len(names):
            raise InputError(f"{where}: expected names that differ, got {shown(value)}")
    elif not (key == "period" and value is None):
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or (key != "offset" and value <= 0):
            above = "" if key == "offset" else " above 0"
            raise InputError(f"{where}: expected a finite number{above}, got {shown(value)}")
