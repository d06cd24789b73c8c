"""Progress: a bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def progress(
    iterable: Iterable[T], *, total: int | None, description: str, initial: int = 0, file: TextIO | None = None
) -> Iterator[T]:
    """Yield the items of `iterable` and print on `file` how many are done.

    Args:
        total: items in all, those done before included; None where unknown.
        description: text at the head of the bar or line.
        initial: items done before this call; they count as done but not for the rate.
        file: stderr by default. A terminal gets a bar, anything else a line every ten seconds and one at the end.
    """
    file = sys.stderr if file is None else file
    if file.isatty():
        yield from tqdm(iterable, desc=description, total=total, initial=initial, file=file, dynamic_ncols=True)
        return
    known = "" if total is None else f" of {total}"
    start = last = time.monotonic()
    done = initial
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done != total:
            last = now
            rate = (done - initial) / (now - start)
            left = "" if total is None else f", {(total - done) / rate:.0f} s left"
            print(f"{description}: {done}{known}, {rate:.1f} per second{left}", file=file, flush=True)
    seconds = time.monotonic() - start
    rate = (done - initial) / max(seconds, 1e-9)
    print(f"{description}: {done}{known}, {rate:.1f} per second, {seconds:.1f} s", file=file, flush=True)
