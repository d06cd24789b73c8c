"""Read TFRecord files without TensorFlow: the framing of records, their checksums, and `tf.train.Example`.

A file, perhaps compressed by gzip, is a row of records: length (uint64), checksum of the length (uint32), data, and
checksum of the data (uint32), all little-endian. A checksum is a CRC32C, rotated by 15 bits, plus a constant. The data
are a protocol buffer `Example`: features by name, each a list of byte strings, floats or integers.

Sources: tensorflow/core/lib/io/record_writer.h and core/example/*.proto (Apache 2.0); RFC 3720 for CRC32C.
"""

import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from setpred.errors import InputError, listed

LARGEST_RECORD = 2**26  # bytes; those of CLEVR with masks have 3.2 million
LENGTH, CRC = struct.Struct("<QI"), struct.Struct("<I")
POLYNOMIAL, ADDED = 0x82F63B78, 0xA282EAD8
MOST_ROWS = 4096  # of the data, whose checksums are computed together
BYTES, FLOATS = 1, 2  # numbers of the kinds of a feature


class Record(NamedTuple):
    """A record: its data, the checksum that the file states, and its place for messages."""

    data: bytes
    stated: int
    where: str

    def check(self) -> None:
        """Raise `InputError` unless the checksum is that of the data."""
        if masked_crc32c(self.data) != self.stated:
            raise InputError(f"{self.where}: expected checksum {self.stated:08x}, got another; download the file again")


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of a file one by one; the checksums of their data are left to the caller.

    Raises:
        InputError: a file that cannot be read, is cut short or damaged; says in which record.
    """
    number, file = 0, None
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            while head := file.read(LENGTH.size):
                where = f"{os.fspath(path)}, record {number}"
                if len(head) < LENGTH.size:
                    raise InputError(f"{where}: the file ends within it; download the file again")
                length, stated = LENGTH.unpack(head)
                if masked_crc32c(head[:8]) != stated:
                    raise InputError(f"{where}: the checksum of its length is wrong; expected an intact TFRecord file")
                if length > LARGEST_RECORD:
                    raise InputError(f"{where}: expected at most {LARGEST_RECORD:,} bytes, got {length:,}")
                data, tail = file.read(length), file.read(CRC.size)
                if len(tail) < CRC.size:
                    raise InputError(f"{where}: the file ends within it; download the file again")
                yield Record(data, CRC.unpack(tail)[0], where)
                number += 1
    except FileNotFoundError as error:
        raise InputError(f"there is no file {os.fspath(path)}; give the name of a TFRecord file") from error
    except (EOFError, OSError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise InputError(
            f"{os.fspath(path)}, record {number}: the file is cut short or damaged ({error}); download it again"
        ) from error


def masked_crc32c(data: bytes) -> int:
    """The checksum of data in a TFRecord file."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + ADDED) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC32C of data.

    The register is linear over GF(2): rows of the data are done together, then joined in pairs, the left one of each
    advanced by as many zero bytes as the right one has. Zeros in front of the data leave an empty register as it is;
    the ones that CRC32C begins with are added to the first four bytes.
    """
    if len(data) < 4:
        crc = 0xFFFFFFFF
        for bit in range(8 * len(data)):
            crc = crc >> 1 ^ (POLYNOMIAL if (crc ^ data[bit // 8] >> bit % 8) & 1 else 0)
        return crc ^ 0xFFFFFFFF
    rows = 1
    while rows < MOST_ROWS and len(data) >= 64 * rows:
        rows *= 2
    width = 2 * -(-len(data) // (2 * rows))
    padded = np.zeros(rows * width, np.uint8)
    first = len(padded) - len(data)
    padded[first:] = np.frombuffer(data, np.uint8)
    padded[first : first + 4] ^= 0xFF
    table, states = _table(), np.zeros(rows, np.uint32)
    for column in np.ascontiguousarray(padded.view("<u2").reshape(rows, width // 2).T):
        states = table.take(states.astype(np.uint16) ^ column) ^ states >> 16
    while len(states) > 1:
        states = _applied(_zeros(width // 2), states[::2]) ^ states[1::2]
        width *= 2
    return int(states[0]) ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """Registers of 16 bits after two zero bytes: `[65536]`."""
    table = np.arange(2**16, dtype=np.uint32)
    for _ in range(16):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@cache
def _zeros(pairs: int) -> np.ndarray:
    """Each bit of the register after `pairs` times two zero bytes: `[32]`."""
    if pairs == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return _table()[bits & 0xFFFF] ^ bits >> 16
    return _applied(_zeros(pairs - pairs // 2), _zeros(pairs // 2))


def _applied(images: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map, given by its images of the 32 bits, of registers."""
    result = np.zeros_like(states)
    for bit in range(32):
        result ^= (states >> np.uint32(bit) & 1) * images[bit]
    return result


class Example:
    """The features of a record, by name.

    Raises:
        InputError: the data are no `Example`; later, a feature is missing, or of another kind or size.
    """

    def __init__(self, record: Record) -> None:
        self.where, self._features = record.where, {}
        try:
            for _, features in _fields(memoryview(record.data), 1):
                for _, entry in _fields(features, 1):
                    (_, name), *_ = _fields(entry, 1)
                    (_, feature), *_ = _fields(entry, 2)
                    self._features[bytes(name).decode()] = next(_fields(feature), (0, memoryview(b"")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.where}: expected a tf.train.Example, got other data ({error})") from error

    def bytes(self, name: str, count: int) -> np.ndarray:
        """`count` bytes, as strings of one byte each or as one string: uint8 `[count]`."""
        content = self._content(name, BYTES, "byte strings")
        raw = np.frombuffer(content, np.uint8)
        if len(raw) == 3 * count and (raw[::3] == 10).all() and (raw[1::3] == 1).all():  # tag and length of each
            return raw[2::3]
        return self._checked(name, count, np.frombuffer(self._joined(name, content), np.uint8))

    def floats(self, name: str, count: int) -> np.ndarray:
        """`count` floats: float32 `[count]`."""
        parts = self._joined(name, self._content(name, FLOATS, "floats"))
        if len(parts) % 4:
            raise InputError(f"{self.where}, feature {name!r}: expected floats of 4 bytes, got {len(parts)} bytes")
        return self._checked(name, count, np.frombuffer(parts, "<f4"))

    def _content(self, name: str, kind: int, what: str) -> memoryview:
        if name not in self._features:
            there = listed(sorted(self._features)) or "none"
            raise InputError(f"{self.where}: expected a feature {name!r}, got {there}")
        found, content = self._features[name]
        if found != kind:
            raise InputError(f"{self.where}, feature {name!r}: expected {what}, got a list of another kind")
        return content

    def _joined(self, name: str, content: memoryview) -> bytes:
        """The values of a list, one after the other."""
        try:
            return b"".join(value for _, value in _fields(content, 1))
        except ValueError as error:
            raise InputError(f"{self.where}, feature {name!r}: {error}; download the file again") from error

    def _checked(self, name: str, count: int, values: np.ndarray) -> np.ndarray:
        if len(values) != count:
            raise InputError(f"{self.where}, feature {name!r}: expected {count:,} values, got {len(values):,}")
        return values


def _fields(message: memoryview, wanted: int | None = None) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields of a message that have one; `ValueError` if it is malformed."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while shift < 64:
            if place >= len(message):
                raise ValueError("it ends within a number")
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value
        raise ValueError("a number is too long")

    while place < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            varint()
            continue
        size = {1: 8, 5: 4}.get(wire) if wire != 2 else varint()
        if size is None or place + size > len(message):
            raise ValueError("it ends within a field" if size else f"a field has the unknown type {wire}")
        content = message[place : place + size]
        place += size
        if wanted in (None, number):
            yield number, content
