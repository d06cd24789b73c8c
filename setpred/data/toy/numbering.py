"""Class-specific numbering: number the elements of each class."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError


class Numbering(World):
    """Multisets of classes; the target numbers the elements of each class.

    The input is one-hot classes `[batch, set_size, classes]`, each drawn uniformly. The target of element i is its
    class, then how many elements of that class came before it, counted from 0: one-hot `[batch, set_size, classes +
    set_size]`. Any order of the numbers within a class is right, so losses and metrics match within classes (see
    `setpred.losses.NumberingLoss`).

    Equal inputs need different outputs: a set-equivariant function cannot do it, a multiset-equivariant one can (Zhang
    et al., ICLR 2022; published with 64 elements of 4 classes and 640, 6,400 or 64,000 training sets).

    Args:
        set_size: elements of a set, and of numbers.
        classes: number of classes.
        arguments: those of `World`.
    """

    def __init__(self, *, set_size: int = 64, classes: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        if set_size < 1 or classes < 1:
            raise InputError(f"expected at least one element and one class, got {set_size} and {classes}; give more")
        self.set_size, self.classes = set_size, classes

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        kinds = rng.integers(self.classes, size=(count, self.set_size))
        elements = np.eye(self.classes, dtype=np.float32)[kinds]
        so_far = elements.cumsum(1)  # of each class, this element included
        numbers = np.take_along_axis(so_far, kinds[..., None], 2)[..., 0].astype(np.int64) - 1
        return {
            "input": elements,
            "elements": np.concatenate([elements, np.eye(self.set_size, dtype=np.float32)[numbers]], axis=2),
        }
