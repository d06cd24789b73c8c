"""Pictures of anybody's: which files are meant, and decoding them ahead of who takes them."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from setpred.data.clevr import load_image
from setpred.data.image_files import SUFFIXES
from setpred.data.workers import available_cores
from setpred.errors import InputError
from setpred.limits import shown

MOST_THREADS = 16


def find_images(
    sources: Iterable[str | os.PathLike[str]], say: Callable[[str], None] = lambda sentence: None
) -> list[str]:
    """Paths of images: each file of `sources` as it is, of each folder those named as images, sorted by name.

    Folders within folders and hidden files are left out, and so are files of other names, which `say` is told.

    Raises:
        InputError: no such file or folder, or a folder without an image.
    """
    found: list[str] = []
    for source in sources:
        if os.path.isfile(source):
            found.append(os.fspath(source))
            continue
        try:
            with os.scandir(source) as entries:
                files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", error)  # a ValueError of a NUL has none
            raise InputError(f"no image or folder of images at {source} ({why})") from error
        names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
        if not names:
            raise InputError(f"the folder {source} has no image; expected files named {', '.join(SUFFIXES)}")
        if others := sorted(set(files).difference(names)):
            say(f"{source}: skipped {len(others)} files that are not named as images, such as {shown(others[0])}")
        found += [os.path.join(source, name) for name in names]
    return found


def decoded(
    paths: Iterable[str], image_size: int, *, ahead: int = 128, threads: int | None = None
) -> Iterator[np.ndarray | InputError]:
    """Images uint8 `[image_size, image_size, 3]` in the order of `paths`; for a broken one what is wrong with it.

    Threads decode while the caller does something else: Pillow lets go of the interpreter meanwhile.

    Args:
        ahead: how many are decoded or under way before they are asked for; that much memory is needed.
        threads: all cores unless given, but no more than 16.
    """
    remaining = iter(paths)
    executor = ThreadPoolExecutor(threads or min(available_cores(), MOST_THREADS))
    load = partial(_load, image_size=image_size)
    try:
        pending = deque(executor.submit(load, path) for path in itertools.islice(remaining, ahead))
        while pending:
            image = pending.popleft().result()
            pending.extend(executor.submit(load, path) for path in itertools.islice(remaining, 1))
            yield image
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _load(path: str, image_size: int) -> np.ndarray | InputError:
    try:
        return load_image(Path(path), image_size, advice="mend it or leave it out")
    except InputError as error:
        return error
