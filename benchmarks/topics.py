"""The topics of the benchmarks, and how to measure one."""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks import growth, memory, minutes_to_ap, trunk
from setpred.workers import keep_freed_memory

TOPICS = ("decoder", "voting", "train_step", "matching", "average_precision", "data", "inference")  # with rows
# with a separate section, `measure` and `markdown`
EXTRAS = {"trunk": trunk, "memory": memory, "growth": growth, "minutes_to_ap": minutes_to_ap}


def measure(topic: str, quick: bool) -> Any:
    """Measure a topic: its rows, or the result of an extra."""
    module = importlib.import_module(f"benchmarks.{topic}")
    return module.measure(quick) if topic in EXTRAS else module.rows(quick)


def measure_alone(topic: str, quick: bool) -> Any:
    """Measure a topic in a fresh process, without the threads, caches or memory of another topic."""
    spawn = multiprocessing.get_context("spawn")
    start = None if topic == "memory" else keep_freed_memory  # as the commands do; the growth of memory needs it freed
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start) as process:
        return process.submit(measure, topic, quick).result()
