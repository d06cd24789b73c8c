"""Errors that a user can correct, and helpers for their messages."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Wrong input of a user: a file, a configuration, a command line.

    The message states the expected and the actual input, and what to do. Commands print it as one sentence and exit
    with status 2; library users catch it as a `ValueError`. Invariants are checked by `assert`, and tensor shapes raise
    a plain `ValueError`.
    """

    def __str__(self) -> str:
        # torch raises a worker's error again with the complete traceback of the worker as its message
        text = super().__str__()
        if not text.startswith("Caught InputError in DataLoader worker"):
            return text
        return re.split(r"^(?:[\w.]+\.)?InputError: ", text.rstrip(), flags=re.MULTILINE)[-1]


def reason(error: BaseException) -> str:
    """The first informative line of the message of a library's error.

    >>> reason(RuntimeError("backend='inductor' raised:\\nNo working C++ compiler found"))
    'No working C++ compiler found'
    """
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40


def shown(value: Any) -> str:
    """The `repr` of an untrusted value in one short line, for messages.

    >>> len(shown("a" * 1000)), shown([1, [2]])
    (80, '[1, [2]]')
    """
    return _short.repr(value)


SHOWN = 8  # names or samples in a message


def listed(items: Sequence[Any]) -> str:
    """The first `SHOWN` items, for a message."""
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


class NotFiniteError(ArithmeticError):
    """A NaN or infinity in the loss, gradient or other `place`; `samples` are positions in the batch."""

    def __init__(self, place: str, samples: list[int]) -> None:
        where = f" in samples {listed(samples)} of the batch" if samples else ""
        super().__init__(f"the {place} is not finite{where}")
        self.place, self.samples = place, samples
