"""The one error type for what a user can mend, and what others' errors say."""

import re


class InputError(ValueError):
    """Bad input from outside: a file, a configuration, a command line.

    The message says what was expected, what came and what to do. The command lines print it as one sentence
    and exit with status 2; library users catch it as a `ValueError`. Broken invariants of our own stay
    `assert`, and wrong tensor shapes stay plain `ValueError`.
    """

    def __str__(self) -> str:
        # torch raises the error of a data loader's worker again with the worker's whole traceback as its message
        text = super().__str__()
        if not text.startswith("Caught InputError in DataLoader worker"):
            return text
        return re.split(r"^(?:[\w.]+\.)?InputError: ", text.rstrip(), flags=re.MULTILINE)[-1]


def reason(error: BaseException) -> str:
    """What an error of somebody else's says first, in one line.

    >>> reason(RuntimeError("backend='inductor' raised:\\nNo working C++ compiler found"))
    'No working C++ compiler found'
    """
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)
