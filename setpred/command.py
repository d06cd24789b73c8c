"""What every command does before its work begins: expand ~, and survive an output that fails."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

UNREADABLE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.ENXIO)  # nobody reads, the terminal is closed, a full disk


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments with a leading ~ expanded to the home folder, also after the `=` of an option.

    Shells expand `--out ~/x` but not `--out=~/x`.

    >>> expanded(["--name=a~b", "x"])
    ['--name=a~b', 'x']
    """
    parts = (re.fullmatch(r"(--[\w.+-]+=|)(~.*)", argument, re.DOTALL) for argument in arguments)
    return [
        argument if found is None else found[1] + os.path.expanduser(found[2])
        for argument, found in zip(arguments, parts, strict=True)
    ]


class LastingStream:
    """A text stream whose failure does not end the program: what cannot be written is dropped.

    Names that the encoding lacks are written with backslashes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            with suppress(OSError, ValueError):  # from now on into nothing, also what is still in its buffer
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._stream.fileno())
                os.close(nothing)


def start(main: Callable[[], int]) -> int:
    """Runs the `main` of a command as the program; returns its exit status."""
    sys.argv[1:] = expanded(sys.argv[1:])
    # None where whoever started the program has closed it
    streams = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout, sys.stderr = map(LastingStream, streams)
    return main()
