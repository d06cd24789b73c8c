"""Errors that a user can correct, and helpers for messages."""

import difflib
import os
import re
import reprlib
import traceback
from collections.abc import Iterable, Mapping, Sequence
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


def located(error: BaseException) -> str:
    """The reason of an error in code of a user, with the innermost line of that code: "reason (my_parts.py, line 7)".

    Call it where the error is caught; lines of setpred and of installed packages are left out.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    others = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")  # setpred, Python
    own = [f for f in frames if not f.filename.startswith(others) and "site-packages" not in f.filename]
    return reason(error) + (f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else "")


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40


def shown(value: Any) -> str:
    """The `repr` of an untrusted value in one short line, for messages.

    >>> len(shown("a" * 1000)), shown([1, [2]])
    (80, '[1, [2]]')
    """
    return _short.repr(value)


def plural(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> plural(1, "object"), plural(2000, "object")
    ('1 object', '2,000 objects')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


SHOWN = 8  # names or samples in a message


def listed(items: Sequence[Any]) -> str:
    """The first `SHOWN` items, for a message."""
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def nearest(word: str, words: Iterable[str]) -> str:
    """The question "did you mean ...?" with the words that look most like a mistyped one; empty where none does.

    Args:
        words: of a mapping, the values of the nearest keys are named.

    >>> nearest("evalute", ["train", "evaluate"]), nearest("x", ["train"]), nearest("epoch", {"epochs": "--epochs"})
    ('; did you mean evaluate?', '', '; did you mean --epochs?')
    """
    named = words if isinstance(words, Mapping) else {each: each for each in words}
    spelled = {each.lower().replace("-", "_"): text for each, text in named.items()}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), spelled, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(dict.fromkeys(spelled[each] for each in found))}?" if found else ""


class NotFiniteError(ArithmeticError):
    """A NaN or infinity in the loss, gradient or other `place`; `samples` are positions in the batch."""

    def __init__(self, place: str, samples: list[int]) -> None:
        where = f" in samples {listed(samples)} of the batch" if samples else ""
        super().__init__(f"the {place} is not finite{where}")
        self.place, self.samples = place, samples
