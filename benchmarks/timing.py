"""Timing in turns: medians, their spread, and the limits of the machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from setpred.workers import keep_freed_memory

Way = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: our implementation against the plain one, timed in one run.

    Args:
        name: the problem and its sizes.
        key: key of the ratio in docs/benchmarks.json.
        plain_ms, ours_ms: medians.
        ratio: median over the turns of plain / ours.
        spread: half the interquartile range of that ratio.
        floor_ms: time of the products at the machine's measured peak, or run alone; None if unknown.
        note: everything else.
    """

    name: str
    key: str
    plain_ms: float
    ours_ms: float
    ratio: float
    spread: float
    floor_ms: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared(name: str, key: str, plain: list[float], ours: list[float], **rest: Any) -> Row:
    """Build a row from two lists of seconds, measured in turns."""
    ratio, spread = ratio_of(plain, ours)
    return Row(name, key, 1e3 * statistics.median(plain), 1e3 * statistics.median(ours), ratio, spread, **rest)


def print_results(text: str | None, measure: Callable[[bool], Iterable[Any]]) -> None:
    """Run one topic as a program, described by `text`: print what it measures, in small sizes with --quick."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    quick = parser.parse_args().quick
    keep_freed_memory()  # as the commands do
    for each in measure(quick):
        print(each, flush=True)


def seconds(way: Way, device: str = "cpu") -> float:
    """Wall time of one call, including its work on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ways: Mapping[str, Way], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each implementation in each turn, alternating, so that a slow minute slows all of them.

    One call of each comes first, unmeasured: memory, caches and compilation.
    """
    for way in ways.values():
        seconds(way, device)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            taken[name].append(seconds(way, device))
    return taken


def ratio_of(slow: list[float], fast: list[float]) -> tuple[float, float]:
    """Median over the turns of the ratio, and half its interquartile range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return middle, (high - low) / 2


def peak_flops(rows: int, width: int, device: str = "cpu") -> float:
    """Highest measured rate of multiplications and additions per second of `[rows, width] @ [width, width]`."""
    features, weight = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    return 2 * rows * width * width / min(seconds(lambda: features @ weight, device) for _ in range(30))


def peak_bandwidth(device: str = "cpu", *, numbers: int = 2**25) -> float:
    """Highest measured rate of bytes per second, read and written, when copying far more than the caches hold."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


class _Products(TorchDispatchMode):
    """A counter like `torch.utils.flop_counter.FlopCounterMode`, which fails where a gradient is taken inside."""

    def __init__(self, *, keep: bool = False) -> None:
        super().__init__()
        self.total, self.keep = 0, keep
        self.calls: list[Way] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
            if self.keep:
                self.calls.append(partial(func, *args, **(kwargs or {})))
        return out


def flops(way: Way) -> int:
    """Multiplications and additions in the matrix products and convolutions of one uncompiled call."""
    with _Products() as counter:
        way()
    return counter.total


def products_alone(way: Way) -> Way:
    """Record the matrix products and convolutions of one uncompiled call of `way`, to replay only these.

    A floor with the shapes, precision and layout of every product, which can take turns with the implementations. It
    keeps their operands in memory.
    """
    with _Products(keep=True) as counter:
        way()

    def alone() -> None:
        with torch.no_grad():
            for call in counter.calls:
                call()

    return alone
