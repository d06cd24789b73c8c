"""Writing a file of prepared images: whole or not at all, continued after an interruption.

HDF5 must not write to the disk by itself: when a delayed write of its fails (a full disk), the error surfaces while
some object is freed, where Python can only print it, and closing the file then succeeds or crashes. So HDF5 writes to
a `_Sink`, which always reports success and keeps the error for us.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from setpred.data.hdf5 import BLOCK, FORMAT, VERSION, Checksum, Header, Record, plain_json, read_header, read_rows
from setpred.errors import InputError
from setpred.files import locked, make_folder, publish, writing
from setpred.progress import progress
from setpred.schema import PRESENCE

SECONDS_BETWEEN_COMMITS = 1.0


def write_set_file(
    path: str | os.PathLike[str],
    header: Header,
    records: Callable[[int], Iterator[Record]],
    *,
    producer: str,
    description: str,
    force: bool = False,
) -> str:
    """Writes `header.images` rows to `path`, with progress.

    The rows go to `path` + ".partial", which takes the final name when it is complete and on the disk. A partial file
    of the same header and producer is continued; another one is replaced, with one sentence.

    Args:
        records: `records(start)` iterates over the rows from number `start` on.
        producer: fingerprint of the code that makes the rows: rows of two versions are not mixed.
        force: replace a finished file of this name; it stays until the new one is complete.

    Returns:
        The SHA-256 of the content.

    Raises:
        InputError: `path` exists, another process is writing it, the disk is full, no permission.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: a folder has this name; choose another name")
    if path.exists() and not force:
        raise InputError(f"{path} exists already; choose another name, or replace it with --force")
    make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    hint = f"; what was done stays in {partial.name}, and the same command goes on from there"
    rights = os.O_RDWR | os.O_CREAT
    with writing(path), locked(partial), open(os.open(partial, rights), "r+b", buffering=0) as raw:
        sink = _Sink(raw.fileno())
        file, done = _open(sink, partial, header, producer)
        try:
            _reserve(sink, partial, header, done)
            with writing(path, hint=hint):
                digest = _write_rows(file, sink, header, records, done, description)
        finally:
            file.close()
        sink.check()
        publish(partial, path)
    return digest


class _Sink(io.FileIO):
    """A file that takes everything and tells the first error when asked."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "r+b", closefd=False)
        self._error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self._error is None:
            try:
                rest = memoryview(data).cast("B")
                while rest:  # on a disk that is nearly full the system writes a part
                    rest = rest[super().write(rest) :]
            except BaseException as error:  # Ctrl-C too
                self._error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        if self._error is None:
            try:
                return super().truncate(size)
            except BaseException as error:
                self._error = error
        return size or 0

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def sync(self) -> None:
        """Everything written lies on the disk when this returns."""
        self.check()
        os.fsync(self.fileno())


def _open(sink: _Sink, partial: Path, header: Header, producer: str) -> tuple[h5py.File, int]:
    """The partial file and the number of rows that it has already."""
    if os.fstat(sink.fileno()).st_size:
        try:
            file = h5py.File(sink, "r+")
            if read_header(file, partial).to_json() == header.to_json() and file.attrs["producer"] == producer:
                done = rows_done(file)
                print(f"{partial} goes on after {done} of {header.images} images", file=sys.stderr)
                return file, done
            file.close()
            print(f"{partial} was of other data, settings or code: starting again", file=sys.stderr)
        except (OSError, RuntimeError, KeyError, InputError):
            print(f"{partial} cannot be read: starting again", file=sys.stderr)
        sink.truncate(0)
    file = h5py.File(sink, "w")
    file.attrs.update(
        format=FORMAT,
        version=VERSION,
        schema=plain_json(header.schema.to_dict()),
        source=plain_json(dict(header.source)),
        images=header.images,
        image_size=header.image_size,
        producer=producer,
    )
    for name, (shape, dtype) in header.layout().items():
        # Every row has its place from the start, so that later writes change no structure of the file: a killed
        # writer leaves a file that opens. `index` counts the rows: -1 until the rest of the row is written.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        if name == "images":
            properties.set_chunk((1, *shape[1:]))
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        if name == "index":
            properties.set_fill_value(np.array(-1, dtype=dtype))
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, properties)
    file.flush()
    return file, 0


def _reserve(sink: _Sink, partial: Path, header: Header, done: int) -> None:
    """Takes the disk space of the whole file now: better no file at once than a full disk an hour later."""
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in header.layout().values())
    with writing(partial, hint=f" (the file takes {size / 1e6:.1f} MB)"):
        try:
            sink.check()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(sink.fileno(), 0, os.fstat(sink.fileno()).st_size)
        except OSError:
            if done == 0:
                partial.unlink()
            raise


def rows_done(file: h5py.File) -> int:
    """Rows of a partial file that are complete and on the disk."""
    missing = file["index"][:] < 0
    return int(missing.argmax()) if missing.any() else len(missing)


def _write_rows(
    file: h5py.File,
    sink: _Sink,
    header: Header,
    records: Callable[[int], Iterator[Record]],
    done: int,
    description: str,
) -> str:
    checksum = Checksum(header)
    for block in read_rows(file, done):
        checksum.update(*block)
    rows = records(done)
    waiting: dict[int, Record] = {}
    committed = time.monotonic()
    try:
        shown = progress(rows, total=header.images, initial=done, description=description)
        for number, record in enumerate(shown, start=done):
            waiting[number] = record
            if len(waiting) == BLOCK or time.monotonic() - committed > SECONDS_BETWEEN_COMMITS:
                _commit(file, sink, waiting, checksum)
                waiting = {}
                committed = time.monotonic()
    finally:
        rows.close()
        _commit(file, sink, waiting, checksum)  # after an interruption too; rows have numbers, so twice does no harm
    assert rows_done(file) == header.images
    file.attrs["objects"] = int(header.schema.values(file["elements"][:], PRESENCE).sum())
    file.attrs["sha256"] = checksum.hexdigest()
    return checksum.hexdigest()


def _commit(file: h5py.File, sink: _Sink, waiting: dict[int, Record], checksum: Checksum) -> None:
    """Writes the waiting rows, then, when they lie on the disk, their index."""
    if not waiting:
        return
    images, elements, camera, index = map(np.stack, zip(*waiting.values(), strict=True))
    rows = slice(min(waiting), max(waiting) + 1)
    file["images"][rows], file["elements"][rows], file["camera"][rows] = images, elements, camera
    file.flush()
    sink.sync()
    file["index"][rows] = index
    file.flush()
    sink.sync()
    checksum.update(images, elements, camera, index)
