"""Time of the average precision of CLEVR's validation set, against the slow twin of the tests.

    python benchmarks/average_precision.py

15,000 images of 10 slots, 3 to 10 objects each, six thresholds, one core. The twin runs on a subset, and its time
on all images is an extrapolation: linear in the images for the per-image protocol, and from below for the one over
the data set, whose twin is quadratic.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from twins import average_precision_per_image_twin, average_precision_twin

from setpred.metrics import THRESHOLDS, average_precision, average_precision_per_image
from setpred.schema import CLEVR

IMAGES, SUBSET, REPEATS = 15_000, 150, 5


def random_sets(images: int, *, noise: float) -> tuple[Tensor, Tensor]:
    """Sets of 3 to 10 objects, and predictions that are those plus noise: nearly perfect to hopeless."""
    generator = torch.Generator().manual_seed(0)
    set_size = CLEVR.max_objects
    target = torch.rand(images, set_size, CLEVR.set_dim, generator=generator)
    target[..., CLEVR.slice("coords")] = 2 * target[..., CLEVR.slice("coords")] - 1
    objects = torch.randint(3, set_size + 1, (images, 1), generator=generator)
    target[..., -1] = (torch.arange(set_size) < objects).float()
    return target + noise * torch.randn(target.shape, generator=generator), target


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs: what else the machine does only ever adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{IMAGES} images x {CLEVR.max_objects} x {len(THRESHOLDS)} thresholds, fastest of {REPEATS}, one core")
    for noise in (0.02, 0.1, 1.0):
        predicted, target = random_sets(IMAGES, noise=noise)
        few = predicted[:SUBSET].tolist(), target[:SUBSET].tolist()
        for function, twin in (
            (average_precision, average_precision_twin),
            (average_precision_per_image, average_precision_per_image_twin),
        ):
            if function(predicted[:SUBSET], target[:SUBSET]) != twin(*few, THRESHOLDS, CLEVR):
                raise SystemExit(f"{function.__name__} differs from its twin at noise {noise}")
            scores = function(predicted, target)
            fast = seconds(lambda f=function, p=predicted, t=target: f(p, t), REPEATS)
            slow = seconds(lambda f=twin, p=few: f(*p, THRESHOLDS, CLEVR), 1)
            print(
                f"noise {noise:<5} {function.__name__:<28} {fast:6.3f} s   twin on {SUBSET} images {slow:5.2f} s, "
                f"extrapolated linearly to all {slow * IMAGES / SUBSET:4.0f} s   AP_1 {scores[1.0]:.3f}"
            )


if __name__ == "__main__":
    main()
