"""The one error type for what a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a file, a configuration, a command line.

    The message says what was expected, what came and what to do. The command lines print it as one sentence
    and exit with status 2; library users catch it as a `ValueError`. Broken invariants of our own stay
    `assert`, and wrong tensor shapes stay plain `ValueError`.
    """
