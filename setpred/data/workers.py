"""Worker processes that survive what users and systems do to them: an ordered map, and a data loader's."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from setpred.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# One thread each: there is a process for every core. And freed memory stays with the process (glibc's malloc): a
# renderer that returns it to the system and asks for it again spends half of its time so.
_SETTINGS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | dict.fromkeys(
    ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**30)
)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """`map(function, items)` over `workers` processes, results in the order of `items`; 0 works in this process.

    Only a few items per worker are under way at a time, so memory stays small however slowly the results are
    taken. When the caller stops early (an error, Ctrl-C, a closed generator) the items under way are finished,
    the others are dropped and no process is left behind; when the caller is killed its workers notice and end.

    Args:
        function: picklable, and so are items and results.

    Raises:
        InputError: a worker died, as happens when memory runs out; and whatever `function` raises.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # Spawned, not forked: a fork of a process with threads (torch, tqdm) can hang, and BLAS reads its number of
    # threads only when it is loaded.
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    remaining = iter(items)
    try:
        with _worker_settings():
            pending = deque(executor.submit(function, item) for item in itertools.islice(remaining, 4 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(executor.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        raise InputError("a worker process died, perhaps for lack of memory; try again with fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Of a data loader's process: signals to the whole group, as of schedulers and terminals, are for its parent.

    The parent saves and stops; without this it would meanwhile lose its data and fail. A SIGTERM from the parent itself
    ends the process. For a `DataLoader`'s `worker_init_fn`.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads started from here on inherit it
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _worker_settings() -> Iterator[None]:
    """Processes started inside the block have the environment that suits a worker."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
