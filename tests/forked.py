"""Trainings in forked processes, which start within a fraction of a second and can be killed.

As a program it imports everything once; then each line of its input is a request in JSON:

    {"arguments": [...], "kill": null | {"seconds": 0.3} | {"call": "write", "number": 4, "signal": 9}}

A child runs `setpred.commands.train.main` with the arguments. It gets the signal (SIGKILL by default) after so many
seconds, or at its n-th call of "write", "fsync" or "replace", which write files (half of the bytes written, not
synced, not renamed), "training_step" or "validation_step"; with "group": true its data loader's processes get it, too.
The answer is a line with the status of the child, negative for a signal that ended it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


class Trainings:
    """Runs trainings one after another; each call returns the exit status, negative if a signal ended it."""

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


def strike(call: str, number: int, *, sent: int = signal.SIGKILL, group: bool = False) -> None:
    """Send this process a signal at the n-th call from now on, or halfway through a file's content."""
    from setpred import files
    from setpred.training.task import SetPrediction

    left = number

    def struck(real, before=lambda *_: None):
        def wrapped(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                before(*arguments)
                send()
            return real(*arguments)

        return wrapped

    def send() -> None:
        if not group:
            return os.kill(os.getpid(), sent)
        if os.fork() == 0:  # from another process, as from a scheduler: torch's processes obey signals of their parent
            os.killpg(0, sent)
            os._exit(0)
        time.sleep(0.5)

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    if call == "write":
        files.Path.write_bytes = struck(Path.write_bytes, half)
    elif call.endswith("_step"):
        setattr(SetPrediction, call, struck(getattr(SetPrediction, call)))
    else:
        setattr(files.os, call, struck(getattr(os, call)))


def child(request: dict[str, Any], answers: int) -> None:
    os.dup2(2, 1)  # output of the training is no answer
    os.close(answers)
    import torch

    from setpred.commands.train import main

    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
    if "call" in (kill := request["kill"] or {}):
        strike(kill["call"], kill["number"], sent=kill.get("signal", signal.SIGKILL), group=kill.get("group", False))
    sys.argv = ["train.py", *request["arguments"]]
    status = main()
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    import setpred.commands.train  # noqa: F401

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
