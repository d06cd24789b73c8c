"""Worker processes and threads: an ordered map, and processes that end with their parent.

The map starts its own processes instead of those of a `DataLoader`, which import torch (seconds each, and `prepare` has
no use for it) and replace the error of a worker by a traceback.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from typing import TypeVar

from setpred.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# one thread each, since there is a process for every core
_SETTINGS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    threads: bool = False,
    ahead: int | None = None,
) -> Iterator[Result]:
    """Map a function over items in several processes or threads; yield the results in the order of the items.

    If the caller stops early (an error, Ctrl-C, a closed generator), the items under way are finished and the others
    dropped, and no process remains. Processes also end when their parent is killed.

    Args:
        function: picklable for processes, as items and results are.
        workers: how many; 0 works in the calling process.
        threads: use threads instead of processes.
        ahead: items under way or finished at a time, which bounds the memory; 4 for each worker by default.

    Raises:
        InputError: a worker process died, for example for lack of memory; and whatever `function` raises.
    """
    if workers == 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    # Spawned, not forked: a fork of a process with threads (torch, tqdm) can hang, and BLAS reads its number of
    # threads only when it is loaded.
    spawn = multiprocessing.get_context("spawn")
    executor = ThreadPoolExecutor(workers) if threads else ProcessPoolExecutor(workers, spawn, initializer=_start)
    try:
        with nullcontext() if threads else _worker_environment():
            pending = deque(
                executor.submit(function, item) for item in itertools.islice(remaining, ahead or 4 * workers)
            )
        while pending:
            result = pending.popleft().result()
            pending.extend(executor.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        raise InputError("a worker process died, perhaps for lack of memory; try again with fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Start processes within the block in the environment that suits a worker."""
    before = dict(os.environ)
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system, with glibc's malloc.

    A training step of the quickstart, or a renderer, otherwise returns its arrays and asks for them again, and the
    system clears each page before: up to a fifth of a step's time. Other libraries of C are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**30)
        mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)  # the most of older versions


def _start() -> None:
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent decides
    end_with_parent()


def end_with_parent() -> None:
    """Start a thread that ends this process, wherever it waits, once its parent has gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def leave_signals_to_parent(worker: int = 0) -> None:
    """Ignore the signals that a scheduler or terminal sends to the process group; a `worker_init_fn`.

    The parent saves and stops, and needs its data until then. A SIGTERM from the parent itself ends the process.
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
