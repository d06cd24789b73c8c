"""Sets of images whose different classes are to be counted."""

from __future__ import annotations

import numpy as np

from setpred.errors import InputError


def check_sizes(sizes: tuple[int, int]) -> tuple[int, int]:
    """Least and most images of a set.

    Raises:
        InputError: there are no such sets.
    """
    if not 1 <= sizes[0] <= sizes[1]:
        raise InputError(f"expected the least and the most images of a set, at least 1, got {list(sizes)}")
    return tuple(sizes)


def sets_to_count(
    images: np.ndarray, classes: np.ndarray, count: int, *, sizes: tuple[int, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """`count` sets of images, and how many different classes are among them, a set of one element.

    First the size of a set is drawn, then how many classes it has, from 1 to what its size allows, all equally
    likely: the size says less than if classes were drawn image by image. Images come again in other sets, and may
    within one.

    Args:
        images: float32 `[images, numbers]`.
        classes: int64 `[images]`, from 0, each with at least one image.
    """
    by_class, available = np.argsort(classes, kind="stable"), np.bincount(classes)
    start = np.cumsum(available) - available
    least, most = sizes
    elements = np.zeros((count, most, images.shape[1]), dtype=np.float32)
    mask = np.zeros((count, most), dtype=bool)
    target = np.zeros((count, 1, 1), dtype=np.float32)
    for i in range(count):
        size = rng.integers(least, most + 1)
        different = rng.integers(1, min(size, len(available)) + 1)
        chosen = rng.choice(len(available), different, replace=False)
        # each of the chosen ones once, the others as they come
        members = rng.permutation(np.concatenate([chosen, rng.choice(chosen, size - different)]))
        elements[i, :size] = images[by_class[start[members] + rng.integers(available[members])]]
        mask[i, :size] = True
        target[i] = different
    return {"input": elements, "input_mask": mask, "elements": target}
