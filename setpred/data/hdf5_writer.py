"""Writing a file of prepared data: complete or not at all, in shards, so that an interrupted job resumes."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from setpred.data.hdf5 import FORMAT, INSTANCES, NAMES, Checksum, Header, Record, pack_names, plain_json, verify
from setpred.data.shards import FINISHED, finished_shards
from setpred.errors import InputError
from setpred.files import make_folder, publish, writing
from setpred.schema import PRESENCE

GZIP_LEVEL = 4
SPARE = 2**16  # bytes of a file beyond its arrays, more than the description takes


def write_set_file(
    path: str | os.PathLike[str],
    header: Header,
    items: Sequence[Any],
    make: Callable[[Sequence[Any]], list[Record]],
    *,
    producer: str,
    description: str,
    workers: int = 0,
    force: bool = False,
    names: Sequence[str] | None = None,
    keep: bool = True,
) -> str:
    """Write the rows that `make` gives for the items to `path`, with progress.

    Shards of rows go to the folder `path` + ".partial"; an interrupted call, repeated, makes those that are missing.
    The file is assembled from them, read back, and only then takes its name. Until then the disk holds it twice.

    Args:
        items: what `make` turns into `header.images` rows, in their order; one for each row, or for a block of them.
        make: the rows of some items; picklable.
        producer: fingerprint of the code that makes the rows: rows of two versions are not mixed.
        workers: processes that make rows; 0 works in this one.
        force: replace a finished file of this name, which stays until the new one is complete.
        names: of the images, to be shown with them.
        keep: whether the finished shards stay after an `InputError` of `make`.

    Returns:
        The SHA-256 of the content.

    Raises:
        InputError: `path` exists, another process is writing it, the disk is full, no permission.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)  # a link stays
    if path.is_dir():
        raise InputError(f"cannot write {path}: a folder has this name; choose another name")
    if path.exists() and not force:
        raise InputError(f"{path} exists already; choose another name, or replace it with --force")
    make_folder(path.parent)
    folder = path.with_name(path.name + ".partial")
    packed = pack_names(names)
    _check_space(path, folder, header)
    job = plain_json({"producer": producer, "header": header.to_json()})
    numbers = math.prod(next(iter(header.layout().values()))[0][1:])  # of an input
    options = {"pixels": max(1, numbers // 3), "workers": workers, "description": description, "keep": keep}
    with (
        writing(path, hint=f"; the complete shards stay in {folder.name}, run the same command again to resume"),
        finished_shards(folder, items, partial(_save_rows, make), _load_rows, job=job, **options) as shards,
    ):
        digest = _assemble(folder / FINISHED, header, shards, producer, packed)
        verify(folder / FINISHED)
        publish(folder / FINISHED, path)
    return digest


def create_arrays(file: h5py.File, header: Header, producer: str) -> None:
    """Give an empty file its description, and arrays without content that have their place already."""
    content = {"schema": plain_json(header.schema.to_dict()), "source": plain_json(dict(header.source))}
    file.attrs.update(content | {"format": FORMAT} | header.sizes() | {"producer": producer})
    for name, (shape, dtype) in header.layout().items():
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if name != INSTANCES:
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        if name in ("images", INSTANCES):
            properties.set_chunk((1, *shape[1:]))
        if name == INSTANCES:  # takes its place as it is written: nobody knows how much
            properties.set_deflate(GZIP_LEVEL)
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, properties)


def _bytes(header: Header) -> int:
    return SPARE + sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in header.layout().values())


def _check_space(path: Path, folder: Path, header: Header) -> None:
    """Better no file at once than a full disk an hour later."""
    free = shutil.disk_usage(path.parent).free + sum(shard.stat().st_size for shard in folder.glob("[0-9]*"))
    if (needed := 2 * _bytes(header)) > free:
        raise InputError(
            f"cannot write {path}: the disk is full; expected {needed / 1e6:.1f} MB for the shards and the file, got "
            f"{free / 1e6:.1f} MB; free some space or choose another place"
        )


def _save_rows(make: Callable[[Sequence[Any]], list[Record]], items: Sequence[Any], path: Path) -> None:
    columns = zip(*(record.parts() for record in make(items)), strict=True)
    with open(path, "wb") as file:
        np.savez(file, **{name: np.stack(column) for name, column in zip(Record._fields, columns, strict=False)})


def _load_rows(path: Path) -> Record:
    with open(path, "rb") as file, np.load(file) as shard:
        return Record(**shard)


def _assemble(path: Path, header: Header, shards: list[Path], producer: str, names: np.ndarray) -> str:
    """Write the file from its shards; return its checksum."""
    with h5py.File(path, "w") as file:
        create_arrays(file, header, producer)
        if names.size:
            file[NAMES] = names
    if hasattr(os, "posix_fallocate"):
        # HDF5 writes late, and then can only print that the disk is full: have the space before
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, _bytes(header) + names.nbytes)
    checksum, objects, start = Checksum(header), 0, 0
    with h5py.File(path, "r+") as file:
        for shard in shards:
            rows = _load_rows(shard)
            checksum.update(*rows.parts())
            objects += int(header.schema.values(rows.elements, PRESENCE).sum())
            stop = start + len(rows.index)
            for name, part in zip(header.layout(), rows.parts(), strict=True):
                file[name][start:stop] = part
            start = stop
        checksum.update_names(names)
        file.attrs.update(objects=objects, sha256=checksum.hexdigest())
    return checksum.hexdigest()
