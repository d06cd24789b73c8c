"""Long jobs in shards: files of some items each, complete or absent, so that an interrupted job resumes."""

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from setpred.errors import InputError
from setpred.files import locked, make_folder, remove_leftovers, replacing, write_atomically, writing
from setpred.progress import progress
from setpred.workers import ordered_map

SHARD, SHARD_PIXELS = 32, 2**21  # most items and most pixels of a shard, what an interruption loses of each worker
FINISHED = "finished"  # the content of a finished job, before it takes its name


@contextmanager
def finished_shards(
    folder: Path,
    items: Sequence[Any],
    make: Callable[[Sequence[Any], Path], None],
    read: Callable[[Path], Any],
    *,
    job: str,
    pixels: int,
    workers: int,
    description: str,
    keep: bool = True,
) -> Iterator[list[Path]]:
    """Make the shards that are missing or damaged; yield the files of all, in order; remove the folder after the block.

    Args:
        folder: folder of the shards. Shards of another job are removed, with one sentence.
        items: one for each image.
        make: `make(items, path)` writes a shard of these items; picklable.
        read: `read(path)` reads a shard, and raises any error if it is missing or damaged.
        job: text that identifies what is made: the settings and the code.
        pixels: of an image.
        workers: processes that make shards; 0 works in this one.
        keep: whether the finished shards stay if `make` raises an `InputError`, for the same job without the error.

    Raises:
        InputError: another process makes them, the disk is full, no permission; and whatever `make` raises.
    """
    if workers < 0:
        raise InputError(f"expected --workers of at least 0 (0 works in one process), got {workers}")
    make_folder(folder)
    size = min(SHARD, max(1, SHARD_PIXELS // pixels))
    paths = [folder / f"{first:09}" for first in range(0, len(items), size)]
    with writing(folder), locked(folder / "lock"):
        _remove_other_job(folder, job)
        missing = [(n * size, path) for n, path in enumerate(paths) if not _intact(path, read)]
        done = len(items) - sum(min(size, len(items) - first) for first, _ in missing)
        if done:
            print(f"resuming {folder} after {done} of {len(items)} images", file=sys.stderr)
        tasks = ((items[first : first + size], path) for first, path in missing)
        try:
            with closing(ordered_map(partial(_write_shard, make), tasks, workers=workers)) as written:
                images = itertools.chain.from_iterable(map(range, written))
                for _ in progress(images, total=len(items), initial=done, description=description):
                    pass
        except InputError:
            if not keep:
                shutil.rmtree(folder)
            raise
        yield paths
        shutil.rmtree(folder)


def _remove_other_job(folder: Path, job: str) -> None:
    remove_leftovers(folder)
    marker = folder / "job"
    if marker.exists() and marker.read_bytes() == job.encode():
        return
    found = [path for path in folder.iterdir() if not path.name.startswith("lock")]
    if found and not marker.exists():
        raise InputError(f"{folder} has {found[0].name}, which is not a shard; move the folder away")
    if found:
        print(f"{folder} holds other data, settings or code: starting again", file=sys.stderr)
    for path in sorted(found, key=marker.__eq__):  # the marker last: without it the others are not known as ours
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(marker, job)


def _intact(path: Path, read: Callable[[Path], Any]) -> bool:
    try:
        read(path)
    except Exception:
        return False
    return True


def _write_shard(make: Callable[[Sequence[Any], Path], None], task: tuple[Sequence[Any], Path]) -> int:
    items, path = task
    with replacing(path) as partial_path:
        make(items, partial_path)
    return len(items)
