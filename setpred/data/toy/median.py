"""Numbers whose median is the target."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError


class Median(World):
    """Sets of numbers, all of a set from one distribution; the target is their median, a set of one element.

    The distributions are those of PyTorch Geometric's example of equilibrium aggregation, after the experiment of its
    paper (Bartunov, Fuchs, Lillicrap, UAI 2022), each equally likely: normal of mean 0.5 and deviation 0.4, gamma of
    concentration 0.2 and rate 0.5 (mean 0.4, most of it near 0), uniform from 0 to 1. The median of an even number of
    numbers is the lower one of the two in the middle, as in that example and in `torch.median`; NumPy's is their mean.

    Args:
        set_size: numbers of a set.
        arguments: those of `World`.
    """

    def __init__(self, *, set_size: int = 100, **arguments: Any) -> None:
        super().__init__(**arguments)
        if set_size < 1:
            raise InputError(f"expected sets of at least one number, got a set_size of {set_size}")
        self.set_size = set_size

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        shape = (count, self.set_size)
        normal, uniform = rng.normal(0.5, 0.4, shape), rng.uniform(0.0, 1.0, shape)
        gamma = rng.gamma(0.2, 1 / 0.5, shape)  # NumPy takes the scale, which is 1 / rate
        which = rng.integers(3, size=(count, 1))
        numbers = np.choose(which, (normal, gamma, uniform)).astype(np.float32)
        middle = (self.set_size - 1) // 2
        median = np.partition(numbers, middle, axis=1)[:, middle]
        return {"input": numbers[:, :, None], "elements": median[:, None, None]}
