"""Files and JSON: written whole or not at all, read with bounds."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from setpred.errors import InputError, shown

LARGEST_NUMBER = 2**63 - 1  # of a position, a count of steps or a seed; torch and HDF5 hold no larger ones
MOST_VALUES = 200_000  # of a record; those of our largest checkpoints have a few thousand
DEEPEST = 64  # nesting of a record; our deepest configurations have 16 levels
LARGEST_IMAGE = 4096  # pixels of a side that a model sees; those of CLEVR are trained on at 128


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


try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would be larger than this system allows; raise the limit or choose another place",
    errno.EACCES: "no permission to write there; choose another place or change the permissions",
    errno.EPERM: "no permission to write there; choose another place or change the permissions",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another place",
    errno.EISDIR: "a folder has this name; choose another name",
    errno.ENOENT: "the folder does not exist and could not be made",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an input/output error; check the disk",
}


def error_number(error: OSError) -> int | None:
    """The errno of an `OSError`, also of those of HDF5, which often say it in the text only."""
    if error.errno is None and (found := re.search(r"errno = (\d+)", str(error))):
        return int(found[1])
    return error.errno


@contextmanager
def writing(path: str | os.PathLike[str], *, hint: str = "") -> Iterator[None]:
    """Turns an `OSError` of the block into an `InputError` that names `path`, the reason and what to do."""
    try:
        yield
    except OSError as error:
        number = error_number(error)
        reason = _ADVICE.get(number) or (os.strerror(number) if number else str(error))
        raise InputError(f"cannot write {os.fspath(path)}: {reason}{hint}") from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made with its parents if need be; `InputError` when that cannot be."""
    folder = Path(path)
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)) from error
    return folder


def publish(partial: Path, final: Path) -> None:
    """Moves a finished file to its final name: it lies on the disk, content first, when this returns."""
    _sync(partial)
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields where to write what will lie under `path` once the block has ended well; the folder is made if need be.

    A link stays, and its target is replaced. A device or a pipe stays, and gets the content.

    Raises:
        InputError: disk full, no permission and their like; what lay under `path` before still lies there.
    """
    final = Path(path)
    if not _replaceable(final):
        with writing(final), tempfile.TemporaryDirectory() as folder:
            yield (aside := Path(folder) / "content")
            with aside.open("rb") as content, _opened(final) as stream:
                shutil.copyfileobj(content, stream)
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


def _opened(path: Path) -> BinaryIO:
    """A device or pipe to write to; an open stream by its descriptor, since opening its name may truncate a file."""
    stream = {"/dev/stdout": sys.stdout, "/dev/stderr": sys.stderr}.get(str(path))
    if stream is None:
        return path.open("wb")
    stream.flush()
    return os.fdopen(os.dup(1 if stream is sys.stdout else 2), "wb")


def _replaceable(path: Path) -> bool:
    """Whether a file may take this name: False for devices, pipes and the names of open streams."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return True
    streams = (("dev", "stdout"), ("dev", "stderr"), ("dev", "fd"))
    return (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and path.absolute().parts[1:3] not in streams


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a small file whole or not at all; errors and folder as in `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder in which nobody writes now."""
    for partial in folder.glob("*.partial-*"):
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked(path: Path, *, passing: bool = False, patience: float = 0.0) -> Iterator[int]:
    """Creates `path` if need be and holds an exclusive lock on it; yields an open descriptor.

    The system drops the lock when the process ends, however it ends, so there are no stale locks; its children, which
    share it, may take some seconds longer.

    Args:
        passing: the file is there for the lock only, and removed at the end.
        patience: seconds to wait for another process to let go.

    Raises:
        InputError: another process holds the lock.
    """
    end = time.monotonic() + patience
    while (descriptor := _try_to_lock(path)) is None:
        if time.monotonic() >= end:
            raise InputError(f"another process is writing {path}; wait until it has ended, or choose another name")
        time.sleep(0.1)
    try:
        yield descriptor
    finally:
        if passing:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_to_lock(path: Path) -> int | None:
    """An open descriptor with the lock; None if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the other process may have published or removed the file between our opening and our locking of it
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
