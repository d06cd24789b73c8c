"""Samples of a running training from outside, and tests for growth."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

MEGABYTE = 2**20
MEMORY = 24 * MEGABYTE  # the resident set may grow by so much from the first third to the last: malloc's unrest
WORKERS_MEMORY = 16 * MEGABYTE  # likewise of all workers together
FILES = 8  # batches under way between processes are open files
SLOWER = 1.3  # processor time of a step: caches are shared with whoever else works on the machine
COLLAPSE = 4.0  # time of a step by the clock: on a busy machine it only tells a collapse


@dataclass(frozen=True)
class Sample:
    """One look at a process and its children, which are its workers."""

    seconds: float
    memory: int  # resident, in bytes
    workers_memory: int  # of all workers together, what they share counted for each
    files: int  # open ones, of all processes together
    threads: int  # of all processes together
    workers: int
    processor: float  # seconds that all have used
    step: int  # of the last row of metrics.csv
    folder_bytes: int  # of the run's folder without metrics.csv
    names: tuple[str, ...]  # in the run's folder and in the folder for temporary files


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if stat := _stat(int(entry)):
            children.setdefault(int(stat[1]), []).append(int(entry))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; nothing once the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def look(pid: int, seconds: float, step: int, run: Path, temporary: Path) -> Sample:
    """What the system says now of the process and its workers."""
    memory, files, threads, processor = [], 0, 0, 0.0
    for each in family(pid):
        try:
            status = dict(line.split(":\t") for line in Path(f"/proc/{each}/status").read_text().splitlines())
            if "VmRSS" not in status:
                continue  # it has ended, and is waited for
            files += len(os.listdir(f"/proc/{each}/fd"))
        except OSError:
            continue  # ended between two looks
        memory.append(1024 * int(status["VmRSS"].split()[0]))
        threads += int(status["Threads"])
        processor += sum(map(int, _stat(each)[11:13] or ["0"])) / os.sysconf("SC_CLK_TCK")
    there = {path: path.stat().st_size for path in run.glob("*") if ".partial" not in path.name}
    size = sum(size for path, size in there.items() if path.name != "metrics.csv")
    names = tuple(sorted([path.name for path in there] + os.listdir(temporary)))
    return Sample(seconds, memory[0], sum(memory[1:]), files, threads, len(memory) - 1, processor, step, size, names)


def thirds(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first and the last third."""
    count = len(samples) // 3
    return samples[:count], samples[-count:]


def most(samples: Sequence[Sample], what: str) -> float:
    return max(getattr(sample, what) for sample in samples)


def seconds_of_a_step(samples: Sequence[Sample], clock: Callable[[Sample], float]) -> float:
    """Validations and checkpoints among them."""
    first, last = samples[0], samples[-1]
    return (clock(last) - clock(first)) / (last.step - first.step)


def growth(samples: Sequence[Sample]) -> list[str]:
    """What grew, in sentences; nothing for a training that could go on for ever.

    `samples` are those after a warm-up. What is counted may not rise above the most of the first third.
    """
    first, last = thirds(samples)
    found = []
    for what, allowed in {"memory": MEMORY, "workers_memory": WORKERS_MEMORY, "files": FILES}.items():
        before, after = most(first, what), most(last, what)
        if after > before + allowed:
            found.append(f"{what} grew from {before:,} to {after:,}; {allowed:,} more are allowed")
    for what in ("threads", "workers"):
        if len(values := {getattr(sample, what) for sample in (*first, *last)}) > 1:
            found.append(f"{what} are not constant: {sorted(values)}")
    names = [set.intersection(*(set(sample.names) for sample in part)) for part in (first, last)]
    if names[0] != names[1]:
        found.append(f"files came or went: {sorted(names[0] ^ names[1])}")
    sizes = [median(sample.folder_bytes for sample in part) for part in (first, last)]
    if sizes[1] > 1.02 * sizes[0]:
        found.append(f"the run's folder grew from {sizes[0]:,} to {sizes[1]:,} bytes")
    clocks = {"processor": (lambda sample: sample.processor, SLOWER), "clock": (lambda s: s.seconds, COLLAPSE)}
    for what, (clock, allowed) in clocks.items():
        before, after = (seconds_of_a_step(part, clock) for part in (first, last))
        if after > allowed * before:
            found.append(f"a step by the {what} took {before:.4f} s at first and {after:.4f} s at last")
    return found


def table(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """First and last third of what docs/reliability.md tells."""
    first, last = thirds(samples)
    parts = first, last
    return {
        "resident set, MB": tuple(round(most(part, "memory") / MEGABYTE, 1) for part in parts),
        "of the workers, MB": tuple(round(most(part, "workers_memory") / MEGABYTE, 1) for part in parts),
        "open files": tuple(most(part, "files") for part in parts),
        "threads": tuple(most(part, "threads") for part in parts),
        "child processes": tuple(most(part, "workers") for part in parts),
        "run's folder, kB": tuple(round(most(part, "folder_bytes") / 1024, 1) for part in parts),
        "steps a second": tuple(round(1 / seconds_of_a_step(part, lambda s: s.seconds), 2) for part in parts),
        "steps a processor second": tuple(
            round(1 / seconds_of_a_step(part, lambda s: s.processor), 2) for part in parts
        ),
    }


def rows(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Plain rows for a CSV file."""
    return [asdict(sample) | {"names": " ".join(sample.names)} for sample in samples]
