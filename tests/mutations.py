"""Damage to files: mutations of their bytes, and of the plain values that they hold.

A mutation is a tuple of plain numbers, so that hypothesis shrinks a failing one and prints it.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**9)
DEEP, DUPLICATE, DIGITS = "@deep@", "@duplicate@", "@digits@"  # replaced by text that no value gives
NASTY: tuple[Any, ...] = (
    *(None, True, False, "", "x", "a" * 100_000, "\0", "../../etc/passwd", "\ud800", "é", "0", "1e5"),
    *(0, -1, 1, 2, 0.5, -0.5, 1e-300, 1e308, 2**16, 2**31, 2**53 + 1, 2**63, 2**64, 10**30),
    *(math.nan, math.inf, -math.inf, [], {}, [[]], [0], [None] * 3, [1.0, 2.0, 3.0], {"x": 1}, list(range(5000))),
    *({"class_path": "os.system", "init_args": {"command": "true"}}, {"class_path": "torch.nn.Identity"}),
    *("setpred.encoders.SmallCNN", "/dev/zero", "-", DEEP, DIGITS),
)
ALIKE: dict[type, tuple[Any, ...]] = {
    int: (0, -1, 1, 2, 3, 7, 100, 1000, 10_000, 2**16, 2**20, 2**31, 2**40, 2**63 - 1),
    float: (0.0, -1.0, 0.1, 2.0, 1e-300, 1e30, 1e308, math.nan, math.inf),
    str: tuple(one for one in NASTY if isinstance(one, str)),
    bool: (False, True),
}

place = st.one_of(st.integers(0, 400), st.integers(-400, -1), st.floats(0, 1))
number = st.integers(0, 2**20)
BYTES = ("flip", "write", "cut", "delete", "insert", "zero")
byte_mutations = st.lists(st.tuples(st.sampled_from(BYTES), place, number), min_size=1, max_size=3)
CHANGES = ("alike", "alike", "replace", "delete", "rename", "duplicate", "nest", "add")
tree_mutations = st.lists(st.tuples(st.sampled_from(CHANGES), number, number), min_size=1, max_size=2)


def mutate_bytes(content: bytes, mutations: list[tuple[str, int | float, int]]) -> bytes:
    """Change, lose or repeat a few bytes."""
    for kind, place, value in mutations:
        found = bytearray(content)
        at = (int(place * len(content)) if isinstance(place, float) else place) % (len(content) or 1)
        length = 1 + value % 64 if value % 3 else 1 + value % max(1, len(content) // 2)
        if kind == "flip" and found:
            found[at] ^= 1 << value % 8
        elif kind == "write":
            integer, width = INTEGERS[value % len(INTEGERS)], (1, 2, 4, 8)[value % 4]
            found[at : at + width] = (integer % 256**width).to_bytes(width, ("little", "big")[value % 2])
        elif kind == "cut":
            del found[at:]
        elif kind == "delete":
            del found[at : at + length]
        elif kind == "insert":
            found[at:at] = bytes(value * i % 256 for i in range(length))
        elif kind == "zero":
            found[at : at + length] = bytes(len(found[at : at + length]))
        content = bytes(found)
    return content


def _places(tree: Any, inside: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every (list or dictionary, key) within a tree."""
    found = [] if inside is None else [(inside, key)]
    if isinstance(tree, dict | list):
        for name in list(tree) if isinstance(tree, dict) else range(len(tree)):
            found += _places(tree[name], tree, name)
    return found


def mutate_tree(tree: Any, mutations: list[tuple[str, int, int]]) -> Any:
    """Replace, lose, move, repeat or nest values of plain data."""
    tree = copy.deepcopy(tree)
    for kind, place, value in mutations:
        places = _places(tree)
        if not places:
            return copy.deepcopy(NASTY[value % len(NASTY)])
        inside, key = places[place % len(places)]
        nasty, old = copy.deepcopy(NASTY[value % len(NASTY)]), inside[key]
        if kind == "delete":
            del inside[key]
        elif kind == "rename" and isinstance(inside, dict):
            inside[("x", "", "class_path", 7)[value % 4]] = inside.pop(key)
        elif kind == "duplicate" and isinstance(inside, dict):
            inside[f"{DUPLICATE}{key}"] = nasty
        elif kind == "duplicate":
            inside.insert(key, copy.deepcopy(old))
        elif kind == "nest":
            inside[key] = [old] if value % 2 else {"x": old}
        elif kind == "add" and isinstance(inside, dict):
            inside["unknown"] = nasty
        elif kind == "alike" and type(old) in ALIKE:
            inside[key] = ALIKE[type(old)][value % len(ALIKE[type(old)])]
        else:
            inside[key] = nasty
    return tree


def as_bytes(text: str) -> bytes:
    """Encode written data, with the texts that no value gives."""
    text = text.replace(DUPLICATE, "")
    for word, meant in ((DEEP, "[" * 50_000 + "]" * 50_000), (DIGITS, "9" * 6_000)):
        text = text.replace(f'"{word}"', meant).replace(word, meant)
    return text.encode(errors="surrogatepass")


def as_json(tree: Any) -> bytes:
    return as_bytes(json.dumps(tree))
