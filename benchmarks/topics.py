"""The topics of the benchmarks, and how to measure one."""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks import growth, memory, minutes_to_ap

TOPICS = ("decoder", "voting", "train_step", "matching", "average_precision", "data", "inference")  # with rows
# with a separate section, `measure` and `markdown`
EXTRAS = {"memory": memory, "growth": growth, "minutes_to_ap": minutes_to_ap}


def measure(topic: str, quick: bool) -> Any:
    """Measure a topic: its rows, or the result of an extra."""
    module = importlib.import_module(f"benchmarks.{topic}")
    return module.measure(quick) if topic in EXTRAS else module.rows(quick)


def measure_alone(topic: str, quick: bool) -> Any:
    """Measure a topic in a fresh process, without the threads, caches or memory of another topic."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, topic, quick).result()
