"""Ways to damage files: their bytes, the values they hold, and the containers that hold those.

A mutation is a function of a file's bytes and is built from plain numbers, so that hypothesis shrinks a failing one to
its simplest form and prints it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**9)
DEEP, TWICE, DIGITS = "@deep@", "@twice@", "@digits@"  # stand for text that no value writes
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
AS_TEXT = {
    DEEP: ("[" * 50_000 + "]" * 50_000),
    DIGITS: "9" * 6_000,
}

where = st.one_of(st.integers(0, 400), st.integers(-400, -1), st.floats(0, 1))
number = st.integers(0, 2**20)
BYTES = ("flip", "set", "write", "cut", "delete", "insert", "repeat", "splice", "zero")
byte_mutations = st.lists(st.tuples(st.sampled_from(BYTES), where, number), min_size=1, max_size=3)
CHANGES = ("alike", "alike", "replace", "delete", "rename", "twice", "nest", "swap", "add", "sign", "scale")
tree_mutations = st.lists(st.tuples(st.sampled_from(CHANGES), number, number), min_size=1, max_size=2)
container_mutations = st.lists(st.tuples(number, number, number), min_size=1, max_size=2)


def mutate_bytes(content: bytes, mutations: list[tuple[str, int | float, int]]) -> bytes:
    """The content with a few of its bytes changed, lost or doubled."""
    for kind, place, value in mutations:
        at = int(place * len(content)) if isinstance(place, float) else place
        at = at % (len(content) or 1)
        length = 1 + value % 64 if value % 3 else 1 + value % max(1, len(content) // 2)
        found = bytearray(content)
        if kind == "flip" and found:
            found[at] ^= 1 << value % 8
        elif kind == "set" and found:
            found[at] = value % 256
        elif kind == "write":
            integer, width = INTERESTING[value % len(INTERESTING)], (1, 2, 4, 8)[value % 4]
            found[at : at + width] = (integer % 256**width).to_bytes(width, ("little", "big")[value % 2])
        elif kind == "cut":
            del found[at:]
        elif kind == "delete":
            del found[at : at + length]
        elif kind == "insert":
            found[at:at] = bytes(value * i % 256 for i in range(length))
        elif kind == "repeat":
            found[at:at] = found[at : at + length]
        elif kind == "splice":
            other = value % (len(content) or 1)
            found[at : at + length] = content[other : other + length]
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
    """Plain data with values replaced, lost, moved, doubled or nested."""
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
        elif kind == "twice" and isinstance(inside, dict):
            inside[f"{TWICE}{key}"] = nasty
        elif kind == "twice":
            inside.insert(key, copy.deepcopy(old))
        elif kind == "nest":
            inside[key] = [old] if value % 2 else {"x": old}
        elif kind == "swap":
            other, name = places[value % len(places)]
            inside[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(old)
        elif kind == "add" and isinstance(inside, dict):
            inside["unknown"] = nasty
        elif kind == "alike" and type(old) in ALIKE:
            inside[key] = ALIKE[type(old)][value % len(ALIKE[type(old)])]
        elif kind == "sign" and isinstance(old, int | float):
            inside[key] = -old
        elif kind == "scale" and isinstance(old, int | float) and math.isfinite(old):
            inside[key] = old * 10 ** (value % 12)
        else:
            inside[key] = nasty
    return tree


def as_text(text: str) -> str:
    """The text of mutated data with what no value writes put in."""
    text = text.replace(TWICE, "")
    for word, meant in AS_TEXT.items():
        text = text.replace(f'"{word}"', meant).replace(word, meant)
    return text


def as_json(tree: Any) -> bytes:
    return as_text(json.dumps(tree)).encode(errors="surrogatepass")


# --- PNG ----------------------------------------------------------------------------------------------------------

CHUNKS: tuple[tuple[bytes, bytes], ...] = (
    (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))),
    (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(50_000_000))),
    (b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))),
    (b"tEXt", b"a\0" + b"x" * 100_000),
    (b"PLTE", bytes(range(30))),
    (b"PLTE", bytes(31)),
    (b"tRNS", bytes(2)),
    (b"gAMA", bytes(4)),
    (b"pHYs", bytes(9)),
    (b"acTL", struct.pack(">II", 1000, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**16, 2**16, 0, 0, 1, 1, 0, 0)),
    (b"fdAT", bytes(8)),
    (b"IHDR", struct.pack(">IIBBBBB", 2**15, 2**15, 8, 2, 0, 0, 0)),
    (b"IDAT", zlib.compress(bytes(1000))),
    (b"IDAT", b"x"),
    (b"IEND", b""),
    (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(100)),
    (b"XXXX", bytes(10)),
)


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def mutate_png(content: bytes, mutations: list[tuple[int, int, int]]) -> bytes:
    """A PNG with chunks changed, all with the right checksums."""
    chunks = chunks_of(content)
    for kind, place, value in mutations:
        at = place % max(1, len(chunks))
        if kind % 5 == 0:
            width, height = (INTERESTING[n % len(INTERESTING)] % 2**32 for n in (place, value))
            chunks[:1] = [(b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])]
        elif kind % 5 == 1:
            fields = [(1, 2, 4, 8, 16, 3)[place % 6], (0, 2, 3, 4, 6, 1)[value % 6], value % 2, 0, place % 3]
            chunks[:1] = [(b"IHDR", chunks[0][1][:8] + bytes(fields))]
        elif kind % 5 == 2 and chunks:
            del chunks[at]
        elif kind % 5 == 3:
            chunks.insert(at, CHUNKS[value % len(CHUNKS)])
        elif chunks:
            name, inside = chunks[at]
            chunks[at] = (name, mutate_bytes(inside, [(BYTES[value % len(BYTES)], place, value)]))
        if not chunks:
            break
    written = (
        struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", zlib.crc32(name + inside))
        for name, inside in chunks
    )
    return content[:8] + b"".join(written)


# --- torch's archives -----------------------------------------------------------------------------------------------


def mutate_zip(content: bytes, mutations: list[tuple[int, int, int]]) -> bytes:
    """An archive with entries changed, all with the right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    compression = zipfile.ZIP_STORED
    for kind, place, value in mutations:
        if not entries:
            break
        at = place % len(entries)
        name, inside = entries[at]
        if kind % 8 == 0:
            del entries[at]
        elif kind % 8 == 1:
            entries.append((name, entries[value % len(entries)][1]))
        elif kind % 8 == 2:
            entries[at] = ((f"../{name}", "/etc/x", "", f"{name}/", "archive/data.pkl", "é")[value % 6], inside)
        elif kind % 8 == 3:
            compression = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[value % 3]
        elif kind % 8 == 4:
            entries[at] = (name, bytes((0, 100, 50_000_000)[value % 3]))
            compression = zipfile.ZIP_DEFLATED if value % 2 else compression
        elif kind % 8 == 5:
            entries.append(("extra/x", bytes(value % 1000)))
        else:  # the pickle, or another entry
            at = next((i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl")), at) if kind % 2 else at
            entries[at] = (entries[at][0], mutate_bytes(entries[at][1], [(BYTES[value % len(BYTES)], place, value)]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, inside in entries:
            archive.writestr(name, inside)
    return buffer.getvalue()


def mutate_safetensors(content: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    """A file of safetensors with another header of the right length."""
    (length,) = struct.unpack_from("<Q", content)
    header = as_json(mutate_tree(json.loads(content[8 : 8 + length]), mutations))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def applied(mutate: Callable[..., bytes], content: bytes, mutations: Any) -> bytes:
    """A mutation, or the bare content where it makes no sense of it."""
    try:
        return mutate(content, mutations)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, struct.error, RecursionError):
        return mutate_bytes(content, [("cut", 0.5, 0)])
