"""Average precision at six thresholds, on one core, against loops over images and predictions.

    python -m benchmarks.average_precision            # 15,000 and 150,000 images
    python -m benchmarks.average_precision --quick    # 200 images

Sets of 10 with 3 to 10 objects each. The plain loops compare the sets image by image in NumPy, then scan the ranked
predictions once per threshold. Both run on all images and must agree. The floor is the time to read predictions and
targets once at the measured bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Row, compared, in_turns, peak_bandwidth, print_results, seconds
from setpred.metrics import THRESHOLDS, average_precision, threshold_name
from setpred.schema import CLEVR, ElementSchema

IMAGES, QUICK = {15_000: 5, 150_000: 3}, {200: 2}  # images: turns
NOISE = 0.1  # between nearly perfect (0.02) and hopeless (1)


def random_sets(images: int, *, noise: float) -> tuple[Tensor, Tensor]:
    """Sets of 3 to 10 objects, and predictions with noise: nearly perfect to hopeless."""
    generator = torch.Generator().manual_seed(0)
    set_size = CLEVR.max_objects
    target = torch.rand(images, set_size, CLEVR.set_dim, generator=generator)
    target[..., CLEVR.slice("coords")] = 2 * target[..., CLEVR.slice("coords")] - 1
    objects = torch.randint(3, set_size + 1, (images, 1), generator=generator)
    target[..., -1] = (torch.arange(set_size) < objects).float()
    return target + noise * torch.randn(target.shape, generator=generator), target


def plain(
    predicted: np.ndarray, target: np.ndarray, thresholds: Sequence[float], schema: ElementSchema = CLEVR
) -> dict[float, float]:
    """The protocol of `setpred.metrics.average_precision`, step by step."""
    ranked, objects = [], 0
    for image, (guesses, truths) in enumerate(zip(predicted, target, strict=True)):
        truths = truths[truths[:, -1] > 0.5]
        objects += len(truths)
        squared, same = np.zeros((len(guesses), len(truths))), np.ones((len(guesses), len(truths)), dtype=bool)
        for field in schema.fields:
            where = schema.slice(field.name)
            if field.categorical:
                same &= guesses[:, where].argmax(1)[:, None] == truths[:, where].argmax(1)
            else:
                steps = guesses[:, None, where].astype(float) - truths[None, :, where]
                squared += ((field.scale * steps) ** 2).sum(-1)
        distance = np.where(same, np.sqrt(squared), math.inf)
        nearest = distance.argmin(1) if len(truths) else np.zeros(len(guesses), dtype=int)
        for slot, aim in enumerate(nearest.tolist()):
            found = float(distance[slot, aim]) if len(truths) else math.inf
            ranked.append((float(guesses[slot, -1]), found, (image, aim)))
    ranked.sort(key=lambda prediction: -prediction[0])
    return {threshold: area(ranked, threshold, objects) for threshold in thresholds}


def area(ranked: list[tuple[float, float, tuple[int, int]]], threshold: float, objects: int) -> float:
    """Area under the monotone envelope of precision against recall."""
    claimed, precisions = set(), []
    for place, (_, distance, aim) in enumerate(ranked, start=1):
        if distance < threshold and aim not in claimed:
            claimed.add(aim)
            precisions.append(len(claimed) / place)
    total = best = 0.0
    for precision in reversed(precisions):
        best = max(best, precision)
        total += best
    return total / objects


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def row(images: int, turns: int, device: str) -> Row:
    predicted, target = random_sets(images, noise=NOISE)
    arrays, tensors = (predicted.numpy(), target.numpy()), (predicted.to(device), target.to(device))
    expected, found = {}, {}

    def obvious() -> None:
        expected.update(plain(*arrays, THRESHOLDS))

    def ours() -> None:
        found.update(average_precision(*tensors, schema=CLEVR))

    once = seconds(obvious)  # so long that neither a first call nor the others matter
    taken = in_turns({"ours": ours}, turns, device)["ours"]
    for threshold, score in expected.items():
        if not math.isclose(score, found[threshold], rel_tol=1e-9):
            raise SystemExit(f"AP {score} against {found[threshold]} under {threshold}")
    where = "gpu" if device == "cuda" else "cpu"
    return compared(
        f"AP of {images:,} images x {CLEVR.max_objects}, {len(THRESHOLDS)} thresholds",
        f"average_precision_{images}_{where}",
        [once] * turns,
        taken,
        floor_ms=1e3 * (predicted.nbytes + target.nbytes) / peak_bandwidth(device),
        note=f"one core; plain once, all images; AP_{threshold_name(0.5)} {found[0.5]:.3f}; floor: reading the sets",
    )


def rows(quick: bool) -> list[Row]:
    """Rows for the CPU, and for a GPU if there is one."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with one_thread():
        return [row(*sizes, device) for device in devices for sizes in (QUICK if quick else IMAGES).items()]


if __name__ == "__main__":
    print_results(__doc__, rows)
