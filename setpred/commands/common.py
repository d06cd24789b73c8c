"""Shared by all commands: options, devices, JSON, output streams, the exit status."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from setpred.errors import InputError, nearest
from setpred.files import write_atomically
from setpred.workers import keep_freed_memory

if TYPE_CHECKING:
    import torch

SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"metavar": "PATH", "help": "FILE.h5 or a CLEVR_v1.0 folder (default: the training's validation data)"},
    "--device": {"default": "auto", "help": "cpu, cuda, … (default: a GPU if one works, else cpu)"},
    "--allow": {
        **{"action": "append", "default": [], "metavar": "PACKAGE.CLASS"},
        "help": "a class of your own that the file may name; repeatable",
    },
    "--json": {"type": Path, "metavar": "FILE", "help": "write the results as JSON"},
}


class Parser(argparse.ArgumentParser):
    """The argument parser of `setpred COMMAND`, which raises `InputError` instead of printing its usage."""

    def __init__(self, command: str = "", description: str = "", **arguments: Any) -> None:
        arguments = {"prog": f"setpred {command}"} | arguments  # parsers of subcommands come with their own
        super().__init__(description=description, allow_abbrev=False, **arguments)

    def add_shared(self, *names: str) -> None:
        """Add options that several commands have, by their names in `SHARED_OPTIONS`."""
        for name in names:
            self.add_argument(name, **SHARED_OPTIONS[name])

    def error(self, message: str) -> NoReturn:
        close = ""
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            close = nearest(found[1].partition("=")[0], _options(self))
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            close = nearest(found[1], re.split(r"'?, '?", found[2].strip("'")))
        raise InputError(f"{message.removeprefix('argument ')}{close or f'; see {self.prog} --help'}")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser and its subcommands."""
    parsers = [
        each for action in parser._actions if isinstance(action.choices, dict) for each in action.choices.values()
    ]
    own = [name for action in parser._actions for name in action.option_strings]
    return [*own, *(name for each in parsers for name in _options(each))]


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """The type of an option: a number of `kind` that is at least `least`.

    >>> at_least(1)("12")
    12
    """

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` raises an error
    return parse


def choose_device(name: str) -> torch.device:
    """The device with this name; "auto" is a GPU if one works, else the CPU.

    Raises:
        InputError: a device that does not exist or cannot compute.
    """
    import torch  # not at the top: the worker processes of `setpred data` do without it

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, which JSON can hold, in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the results of a command for `--json`; nothing without a path."""
    if path is not None:
        write_atomically(path, json.dumps(finite(result), indent=2) + "\n")


UNWRITABLE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.ENXIO)  # closed pipe, closed terminal, full disk


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
    """A text stream that drops what it cannot write, instead of ending the program.

    Characters outside the encoding are written with backslashes.
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
            if error.errno not in UNWRITABLE:
                raise
            with suppress(OSError, ValueError):  # drop all later output, and what the buffer holds
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
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def start(main: Callable[[], int]) -> int:
    """Run the `main` of a command as the program; return its exit status."""
    keep_freed_memory()
    sys.argv[1:] = expanded(sys.argv[1:])
    # a stream is None if the parent process closed it
    streams = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout, sys.stderr = map(LastingStream, streams)
    return main()
