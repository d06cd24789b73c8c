"""The folder of a run: one training at a time, an earlier run kept, the newest whole checkpoint found."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from setpred.checkpoint.load import read_checkpoint
from setpred.errors import InputError
from setpred.files import locked, make_folder, writing

PATIENCE = 15.0  # seconds; the data loader's processes of a training that was killed take five to notice


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A run's folder for one training at a time: another one of its name would move it, or replace its checkpoints."""
    lock = make_folder(folder.parent) / f".{folder.name}.lock"
    with ExitStack() as held:
        with writing(lock):
            try:
                held.enter_context(locked(lock, passing=True, patience=PATIENCE))
            except InputError as error:
                says = f"another training writes into {folder}; wait for its end, or give this one a --name"
                raise InputError(says) from error
        yield


def set_aside(folder: Path) -> Path | None:
    """Keeps an earlier run of the same name under another name; returns that name, None if there was none.

    Where the folder is a link, the folder that it points to is moved, and the link stays.
    """
    if not any(folder.glob("*.ckpt")):
        return None
    folder = folder.resolve() if folder.is_symlink() else folder
    number = 1
    while (kept := folder.with_name(f"{folder.name}-before-{number}")).exists():
        number += 1
    with writing(folder):
        folder.rename(kept)
    make_folder(folder)
    print(f"an earlier run was in {folder}: it is kept in {kept} (pass --resume last to continue it)", flush=True)
    return kept


def put_back(folder: Path, kept: Path) -> None:
    """Gives the earlier run its name back after a start that failed, if that has left no more than its settings."""
    folder = folder.resolve() if folder.is_symlink() else folder
    if {path.name for path in folder.iterdir()} <= {"config.yaml", "tensorboard"}:  # whose logger writes before a step
        shutil.rmtree(folder)
        kept.rename(folder)
        print(f"moved the previous run back to {folder}", flush=True)


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path:
    """last.ckpt, or best.ckpt if a fault of the disk has damaged it, which is said.

    Raises:
        InputError: there is none.
    """
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if not last.exists():
        raise InputError(f"nothing to resume: no {last}; start without --resume, or give the run's --name")
    try:
        read_checkpoint(last)
    except InputError as error:
        if not best.exists():
            raise
        say(f"{error}; going on from {best}, which is older")
        return best
    return last


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal.

    Attributes: `status`, with which the program ends: 128 and the signal's number, as shells have it.
    """

    def __init__(self, folder: Path, number: int = signal.SIGINT, *, saved: bool = False) -> None:
        last = folder / "last.ckpt"
        name = signal.Signals(number).name
        if saved:
            says = f"stopped by {name}; {last} has all that was trained, go on from it with --resume last"
        elif last.exists():
            says = f"interrupted; {last} has what was trained until it was written, go on from it with --resume last"
        else:
            says = "interrupted before there was anything to save"
        super().__init__(says)
        self.status = 128 + number
