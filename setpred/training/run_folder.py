"""Folder of a run: one training at a time, earlier runs kept, the newest readable checkpoint."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from setpred.checkpoint.load import read_checkpoint
from setpred.errors import InputError
from setpred.files import locked, make_folder, writing

PATIENCE = 15.0  # seconds; the data loader's processes of a killed training end within five


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run's folder: another training of its name would move it, or replace its checkpoints.

    Raises:
        InputError: another training holds the lock.
    """
    lock = make_folder(folder.parent) / f".{folder.name}.lock"
    with ExitStack() as held:
        with writing(lock):
            try:
                held.enter_context(locked(lock, passing=True, patience=PATIENCE))
            except InputError as error:
                text = f"another training writes into {folder}; wait for its end, or give this one a --name"
                raise InputError(text) from error
        yield


@contextmanager
def earlier_run_aside(folder: Path) -> Iterator[None]:
    """Move an earlier run out of `folder` to another name; move it back if the block fails before its first checkpoint.

    A saved step with non-finite numbers stays in `folder`. Where this is a link, its target is moved, and the link
    stays.
    """
    if not any(folder.glob("*.ckpt")):
        yield
        return
    folder = folder.resolve() if folder.is_symlink() else folder
    number = 1
    while (kept := folder.with_name(f"{folder.name}-before-{number}")).exists():
        number += 1
    with writing(folder):
        folder.rename(kept)
    make_folder(folder)
    print(f"moved the previous run: it is kept in {kept} (pass --resume last to continue it instead)", flush=True)
    try:
        yield
    except BaseException:
        repros = list(folder.glob("repro-step-*.pt"))
        # written before the first checkpoint; without one `--resume auto` would start a new run
        if {path.name for path in folder.iterdir()} <= {"config.yaml", "tensorboard", *(path.name for path in repros)}:
            for path in repros:
                path.replace(kept / path.name)
            shutil.rmtree(folder)
            kept.rename(folder)
            print(f"moved the previous run back to {folder}", flush=True)
        raise


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Path and content of last.ckpt, or of best.ckpt if last.ckpt is damaged.

    Raises:
        InputError: there is no readable checkpoint.
    """
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if not last.exists():
        raise InputError(f"nothing to resume: no {last}; start without --resume, or give the run's --name")
    try:
        return last, read_checkpoint(last)
    except InputError as error:
        if not best.exists():
            raise
        say(f"{error}; falling back to {best}, which is older")
        return best, read_checkpoint(best)
