"""What all commands share: arguments, output streams, devices, JSON."""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from setpred.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one that works."""
    import torch  # not at the top: worker processes of `setpred data` need none of it

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def finite(value: Any) -> Any:
    """JSON has no NaN: what there was nothing to average becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def exit_code(command: Callable[[], int | None], *, interrupted: str = "interrupted; nothing was written") -> int:
    """Run a command and return its exit status.

    An `InputError` prints one sentence on stderr and gives 2; Ctrl-C prints `interrupted` and gives 130; a closed
    pipe gives 1. Otherwise the status is what the command returns, 0 for None.
    """
    try:
        return command() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if hasattr(stopped, "status"):  # a training that has saved its state says so
            raise
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def start(main: Callable[[], int]) -> int:
    """Run the `main` of a command as the program; return its exit status."""
    sys.argv[1:] = expanded(sys.argv[1:])
    # None where whoever started the program has closed it
    streams = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout, sys.stderr = map(LastingStream, streams)
    return main()
