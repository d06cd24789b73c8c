"""Files and JSON: atomic writes, locks, and bounds for what untrusted files may hold."""

import errno
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from setpred.errors import InputError, shown

LARGEST_NUMBER = 2**63 - 1  # of a position, a count of steps or a seed: the range of torch and HDF5
LARGEST_IMAGE = 4096  # pixels of a side that a model sees; CLEVR models see 128
MOST_VALUES = 200_000  # within a record; our largest checkpoints have a few thousand
DEEPEST = 64  # levels of a record; our deepest configurations have 16


def require_regular(path: str | os.PathLike[str], *, advice: str) -> int:
    """Return the size in bytes of a regular file, or of a link's target; a pipe or a device may never end.

    Raises:
        InputError: a folder, pipe, device or impossible name. `OSError`: no such file, no permission.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a NUL within the name
        raise InputError(f"{shown(os.fspath(path))} is no name of a file; {advice}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file (a folder, pipe or device); {advice}")
    return found.st_size


def leaves(value: Any, name: str, *, most: int = MOST_VALUES) -> Iterator[tuple[str, Any]]:
    """Yield every value within dictionaries and lists, with its place.

    Raises `InputError` beyond `most` values or `DEEPEST` levels. A shared value counts each time it occurs, so
    references that multiply or form a cycle are bounded, too.

    >>> list(leaves({"a": [1, 2]}, "x"))
    [('a.0', 1), ('a.1', 2)]
    """
    waiting, count = [((), value)], 0
    while waiting:
        keys, item = waiting.pop()
        if not isinstance(item, dict | list | tuple):
            yield ".".join(key if isinstance(key, str) and len(key) < 80 else shown(key) for key in keys), item
            continue
        inside = list(item.items() if isinstance(item, dict) else enumerate(item))
        count += len(inside)
        if count > most or len(keys) >= DEEPEST:
            raise InputError(f"{name}: expected at most {most:,} values in {DEEPEST} levels, got more; do not trust it")
        waiting += [((*keys, key), child) for key, child in reversed(inside)]


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse untrusted JSON; raise `InputError` for NaN, infinity, thousands of digits, duplicate keys, deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error})") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise `ValueError` on a duplicate key, which Python would drop."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key comes twice among {shown([key for key, _ in pairs])}")
    return found


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {shown(digits)} is not finite")
    return value


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would be larger than this system allows; raise the limit or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EISDIR: "a folder has this name; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an input/output error; check the disk",
}
_ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM), "no permission to write there; choose another place")
_ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of the path is a file, not a folder; rename it")


@contextmanager
def writing(path: str | os.PathLike[str], *, hint: str = "") -> Iterator[None]:
    """Convert an `OSError` of the block to an `InputError` with the path, the reason and advice."""
    try:
        yield
    except OSError as error:
        number = error.errno
        if number is None and (found := re.search(r"errno = (\d+)", str(error))):  # of HDF5
            number = int(found[1])
        reason = _ADVICE.get(number) or (os.strerror(number) if number else str(error))
        raise InputError(f"cannot write {os.fspath(path)}: {reason}{hint}") from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder with its parents if it does not exist; raise `InputError` if that fails."""
    folder = Path(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file to its final name; content and name are on the disk on return."""
    _sync(partial)
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")


def descriptor(path: str | os.PathLike[str]) -> int | None:
    """The number of the descriptor that a path names, to write by it: opening the name may truncate a file."""
    found = _DESCRIPTOR.fullmatch(name := os.fspath(path))
    return _STREAMS.get(name) if found is None else int(found[1])


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block succeeds, and delete it when the block fails.

    Missing folders are created. A link stays, and its target is replaced. A device or a pipe receives the content.
    On a full disk, missing permission and similar faults raises `InputError`, and an earlier file stays.
    """
    final = Path(path)
    stream = descriptor(final)
    if stream is not None or (os.path.exists(final) and not final.is_file() and not final.is_dir()):
        with writing(final), tempfile.TemporaryDirectory() as folder:
            yield (content := Path(folder) / "content")
            sys.stdout.flush()
            with open(final if stream is None else os.dup(stream), "wb") as target:
                target.write(content.read_bytes())
        return
    final = final.resolve() if final.is_symlink() else final
    make_folder(final.parent)
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    with writing(final):
        try:
            yield partial
            publish(partial, final)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a small file by way of `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder without active writers."""
    for partial in folder.glob("*.partial-*"):
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked(path: Path, *, passing: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if need be; the system releases it when the process ends.

    Args:
        path: file of the lock.
        passing: whether to remove the file afterwards.
        patience: seconds to wait for another process; then raises `InputError`.
    """
    lock = FileLock(path, timeout=patience)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing {path}; wait for its end, or choose another name") from error
    try:
        yield
    finally:
        if passing:
            path.unlink(missing_ok=True)  # while held: a waiting process then creates a new file
        lock.release()
