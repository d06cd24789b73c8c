"""The file of results of a comparison: a line of JSON for each run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from setpred.errors import InputError
from setpred.files import make_folder, writing

Run = dict[str, Any]
Key = tuple[str, int, str, tuple[str, ...]]


def key(run: Run) -> Key:
    """What makes a run the same as another: configuration, seed, budget and options."""
    return run["digest"], run["seed"], run["budget"], tuple(run["options"])


class Results:
    """A file to which several processes may add at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Key, Run]:
        """All whole lines; of runs that were tried again, the last.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: expected the results of a comparison, got what cannot be read") from error
        runs: dict[Key, Run] = {}
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                runs[key(run)] = run
            except (ValueError, KeyError, TypeError):  # a process was killed while it wrote
                print(f"{self.path}: line {number} is not a whole result; it is left out", flush=True)
        return runs

    def add(self, run: Run) -> None:
        """Appends a line in one piece; one that somebody left without its end does not swallow it.

        Raises:
            InputError: the file cannot be written.
        """
        make_folder(self.path.parent)
        with writing(self.path), self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            ended = file.read(1) in (b"", b"\n")
            file.write((("" if ended else "\n") + json.dumps(run) + "\n").encode())
