"""YAML from anybody: plain values, each key once, no larger than a configuration is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import yaml

from setpred.errors import InputError
from setpred.limits import require_regular, shown

LARGEST = 1_000_000  # characters of a file; the longest configuration of a run has 5,000
LONGEST = 4096  # of one value, as of the longest path; reading a number takes the square of its length
DEEPEST = 64  # lists and mappings within each other
MOST = 2000  # values, aliases counted as what they stand for; the configuration of a run has 150


@dataclass
class _Open:
    """A list or mapping whose end has not been read."""

    anchor: str | None
    mapping: bool
    values: int = 1
    keys: set[str] = field(default_factory=set)
    at_key: bool = True


def check(text: str) -> None:
    """Reads YAML without building anything from it, in time and memory that its length bounds.

    Raises:
        yaml.YAMLError: not YAML; larger or deeper than a configuration is, aliases written out ("billion laughs", or
            ones within themselves); a tag, which could ask for objects; a key twice, of which one would be lost.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"expected a configuration of at most {LARGEST:,} characters, got more")
    sizes: dict[str, int] = {}  # values that an alias stands for, by its anchor
    levels: list[_Open] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"expected plain values, got the tag {event.tag!r}; leave it out")
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(levels) > DEEPEST:
                raise yaml.YAMLError(f"expected at most {DEEPEST} lists and mappings within each other")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            values, anchor = levels[-1].values, levels.pop().anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for nothing before it, or for what it is in")
            values, anchor = sizes[event.anchor], None
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST:
                raise yaml.YAMLError(f"expected values of at most {LONGEST:,} characters, got {len(event.value):,}")
            values, anchor = 1, event.anchor
        else:
            continue
        if anchor is not None:
            sizes[anchor] = values
        if values > MOST or (levels and levels[-1].values + values > MOST):
            raise yaml.YAMLError(f"expected at most {MOST:,} values, aliases counted as what they stand for")
        if levels:
            _put(levels[-1], event, values)


def _put(inside: _Open, event: yaml.Event, values: int) -> None:
    """Counts a value, which may be a key, to what it is in."""
    inside.values += values
    if not inside.mapping:
        return
    if inside.at_key and isinstance(event, yaml.ScalarEvent):
        if event.value in inside.keys:
            raise yaml.YAMLError(
                f"the key {event.value!r} stands twice, last in line {event.start_mark.line + 1}; leave one out"
            )
        inside.keys.add(event.value)
    inside.at_key = not inside.at_key


def load(text: str) -> object:
    """What `yaml.safe_load` makes of text that `check` accepts.

    Raises:
        yaml.YAMLError: see `check`; values that cannot be read.
    """
    try:
        check(text)
        return yaml.safe_load(text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # also half of a pair of characters
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, object]:
    """What a file of named values says.

    Raises:
        InputError: it cannot be read, or is not what `load` takes, or not of named values.
    """
    try:
        require_regular(path, advice="give the file of a configuration")
        with open(path, encoding="utf-8") as file:
            said = load(file.read(LARGEST + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise InputError(f"{path}: expected a configuration in YAML that can be read, got: {why}") from error
    if not isinstance(said, dict) or not all(isinstance(key, str) for key in said):
        raise InputError(f"{path}: expected a configuration, with model: and data: in it, got {shown(said)}")
    return said
