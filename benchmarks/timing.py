"""How everything here is timed: in turns, medians, with the spread, against what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Way = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: our way against the plain way, both timed in one run.

    Args:
        name: what is timed, with its sizes.
        key: under which machines find the ratio in docs/benchmarks.json.
        plain_ms, ours_ms: medians.
        ratio: median over the turns of plain / ours.
        spread: half the distance of the quartiles of that ratio.
        floor_ms: what the machine needs for the products, at its measured peak or run alone; None where nothing says.
        note: the rest.
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
    """The row of two lists of seconds, taken in turns."""
    ratio, spread = ratio_of(plain, ours)
    return Row(name, key, 1e3 * statistics.median(plain), 1e3 * statistics.median(ours), ratio, spread, **rest)


def seconds(way: Way, device: str = "cpu") -> float:
    """Wall time of one call, to the end of its work on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ways: Mapping[str, Way], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way in each turn; one after the other, so that a slow minute is slow for all.

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
    """Median over the turns of how many times slower, and half the distance of its quartiles."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return middle, (high - low) / 2


def peak_flops(rows: int, width: int, device: str = "cpu") -> float:
    """Most multiplications and additions a second that a product `[rows, width] @ [width, width]` reaches here."""
    features, weight = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    return 2 * rows * width * width / min(seconds(lambda: features @ weight, device) for _ in range(30))


def peak_bandwidth(device: str = "cpu", *, numbers: int = 2**25) -> float:
    """Most bytes a second that copying far more than the caches hold moves here, read and written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


class _Products(TorchDispatchMode):
    """Counts as `torch.utils.flop_counter.FlopCounterMode` does, which fails where a gradient is taken inside."""

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
    """Multiplications and additions in the matrix products and convolutions of one call, which must not be compiled."""
    with _Products() as counter:
        way()
    return counter.total


def products_alone(way: Way) -> Way:
    """The matrix products and convolutions of one call of `way`, which must not be compiled, and nothing else.

    A floor that keeps the shapes, precision and layout of every product, and can take turns with the ways. It holds
    what they read in memory.
    """
    with _Products(keep=True) as counter:
        way()

    def alone() -> None:
        with torch.no_grad():
            for call in counter.calls:
                call()

    return alone
