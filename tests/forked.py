"""Trainings as processes of their own that can be killed, started in a fraction of a second by a fork.

Run as a program it imports everything once; then each line on its input is a request, JSON:

    {"arguments": [...], "kill": null | {"seconds": 0.3} | {"call": "write" | "fsync" | "replace", "number": 4}}

for which it forks a child that runs `setpred.cli.main` with these arguments, and is killed (SIGKILL) so many seconds
later, or by itself in the middle of its n-th call that writes: half of the bytes written, not synced, not renamed. The
answer is a line with the status of the child, negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


class Trainings:
    """Starts trainings one after another; each call gives the exit status, negative if a signal ended it."""

    def __init__(self, log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                cwd=log.parent,
            )

    def __call__(self, *arguments: str, kill: dict[str, Any] | None = None) -> int:
        self.process.stdin.write(json.dumps({"arguments": arguments, "kill": kill}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def die_within(call: str, number: int) -> None:
    """From now on the n-th call that writes a checkpoint or another small file kills this process half-way."""
    from setpred import files

    left = number

    def dying(real, before):
        def wrapped(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                before(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return wrapped

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    if call == "write":
        files.Path.write_bytes = dying(Path.write_bytes, half)
    else:
        setattr(files.os, call, dying(getattr(os, call), lambda *_: None))


def child(request: dict[str, Any], answers: int) -> None:
    os.dup2(2, 1)  # what the training prints does not belong among the answers
    os.close(answers)
    import torch

    from setpred.cli import main

    torch.set_num_threads(1)
    if "call" in (request["kill"] or {}):
        die_within(request["kill"]["call"], request["kill"]["number"])
    sys.argv = ["train.py", *request["arguments"]]
    status = main()
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    import setpred.cli  # noqa: F401

    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(request, answers)
            except BaseException:
                traceback.print_exc()
            os._exit(99)
        seconds = (request["kill"] or {}).get("seconds")
        timer = threading.Timer(seconds or 0, os.kill, (pid, signal.SIGKILL))
        if seconds is not None:
            timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve()
