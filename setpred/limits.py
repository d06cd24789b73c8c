"""How much is believed of what a file says: the caps on sizes, numbers and nesting that come from files."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from typing import Any

from setpred.errors import InputError

# 256 objects in all pairs, the largest number that a part of any configuration here stands for; with two of these as
# width and length a model has no more numbers than can be counted
LARGEST_SIZE = 2**16
LARGEST_NUMBER = 2**63 - 1  # of a position, a count of steps or a seed; torch and HDF5 hold no larger ones
MOST_VALUES = 200_000  # of a record; those of our largest checkpoints have a few thousand
DEEPEST = 64  # nesting of a record; our deepest configurations have 16 levels
LARGEST_IMAGE = 4096  # pixels of a side that a model sees; those of CLEVR are trained on at 128
SEEDS = ("seed",)  # keys of numbers that are no sizes
LAYERS = ("layers", "num_layers", "num_encoder_layers", "num_decoder_layers")  # each takes a thousand times a number's
MOST_LAYERS = 1000

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40


def shown(value: Any) -> str:
    """`repr` in one short line, whatever a file holds: for messages.

    >>> len(shown("a" * 1000)), shown([1, [2]])
    (80, '[1, [2]]')
    """
    return _short.repr(value)


def require_regular(path: str | os.PathLike[str], *, advice: str) -> int:
    """Bytes of a file, after checking that it is one: reading a pipe or a device may never end.

    Raises:
        InputError: something else than a regular file (a link counts as what it leads to).
        OSError: no such file, no permission, a name that no file can have.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a NUL within the name
        raise InputError(f"{shown(os.fspath(path))} is no name of a file; {advice}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file (a folder, pipe or device); {advice}")
    return found.st_size


def leaves(value: Any, name: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value within dictionaries and lists, with the keys that lead there, last one first.

    Raises:
        InputError: nested deeper than `DEEPEST`, or more than `MOST_VALUES` values; a list in itself is both.
    """
    waiting: list[tuple[tuple[Any, ...], Any, int]] = [((), value, 0)]
    count = 0
    while waiting:
        keys, item, depth = waiting.pop()
        count += 1
        if depth > DEEPEST:
            raise InputError(f"{name} is nested deeper than {DEEPEST} levels, which none of ours is; do not trust it")
        if isinstance(item, dict):
            beside = getattr(item, "__dict__", {})  # of an `OrderedDict` of torch; could stand in for its methods
            if beside.keys() - {"_metadata"}:
                raise InputError(f"{name} has a dictionary with attributes {shown(list(beside))}; do not trust it")
            inside = [*dict.items(item), *beside.items()]
        elif isinstance(item, list | tuple):
            inside = list(enumerate(item))
        else:
            yield keys, item
            continue
        if count + len(waiting) + len(inside) > MOST_VALUES:
            raise InputError(f"{name} has more than {MOST_VALUES} values, which none of ours has; do not trust it")
        waiting += [((key, keys), child, depth + 1) for key, child in inside]


def place(keys: tuple[Any, ...]) -> str:
    """What `leaves` says of a value's place, as words.

    >>> place(("b", ("a", ())))
    'a.b'
    """
    words: list[str] = []
    while keys:
        key, keys = keys
        words.append(key if isinstance(key, str) and len(key) < 80 else shown(key))
    return ".".join(reversed(words))


def check_sizes(config: Any, name: str) -> None:
    """Whole numbers of a model's configuration are sizes, but for seeds: none is larger than `LARGEST_SIZE`.

    Raises:
        InputError: names the first one that is; see also `leaves`.
    """
    for keys, value in leaves(config, name):
        key = keys[0] if keys else None
        most = LARGEST_NUMBER if key in SEEDS else MOST_LAYERS if key in LAYERS else LARGEST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise InputError(
                f"{name} asks for {place(keys)} = {shown(value)}, expected at most {most}; such a model cannot be meant"
            )


def parse_json(text: str | bytes, name: str) -> Any:
    """A JSON document from a stranger: finite numbers of ordinary length, no key twice, `DEEPEST` levels at most.

    Raises:
        InputError: it is not.
    """

    try:
        document = json.loads(
            text, object_pairs_hook=once, parse_int=whole_number, parse_float=real_number, parse_constant=real_number
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error})") from error
    for _ in leaves(document, name):
        pass
    return document


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys Python lets come twice: two readers might then see two documents."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key comes twice among {shown([key for key, _ in pairs])}")
    return found


def whole_number(digits: str) -> int:
    """An integer of JSON, which has no bound on its digits."""
    value = int(digits) if len(digits) <= 20 else LARGEST_NUMBER + 1
    if abs(value) > LARGEST_NUMBER:
        raise ValueError(f"the number {shown(digits)} of {len(digits)} digits is more than 64 bits hold")
    return value


def real_number(digits: str) -> float:
    """A number of JSON that must be finite: neither 1e999 nor the NaN and Infinity that Python reads."""
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {shown(digits)} is not finite")
    return value
