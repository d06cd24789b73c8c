"""Rows of points whose depth the view leaves open: in front of the screen, or behind it."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError


class Depths(World):
    """Rows of points seen from the side, where depth is known up to its sign: two sets fit each input.

        x_k = -1, …, 1 in n equal steps,    z_k = s (a + b x_k),    s = ±1

    with n from 2 to `set_size`, a in [0.3, 0.7] and b in [-0.2, 0.2], all uniform: without parallax, a row in front of
    the screen looks like its mirror image behind it (Necker's reversal). The input has [x_k, |z_k|, q] of each point;
    q, the same in a set and uniform in [0, 1], is the probability of s = 1. The target has [x_k, z_k, presence]. So the
    answers are known: of good samples a share q has positive depths. The mirror images are D = 2a apart, the mean over
    points, and the energy of `setpred.metrics.EnergyScore`, its cutoff over 2, is in the mean

        1/6 for samples of the truth (q (1 - q) D),    1/4 for the likelier set,    1/3 for the mean of both sets.

    Args:
        set_size: points of a set, at most.
        seen: False hides the input, which is zeros then: sets are to be sampled from their distribution as a whole.
        arguments: those of `World`.
    """

    def __init__(self, *, set_size: int = 5, seen: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        if set_size < 2:
            raise InputError(f"expected sets of up to two points or more, got a set_size of {set_size}")
        self.set_size, self.seen = set_size, seen

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        n = rng.integers(2, self.set_size + 1, (count, 1))
        a, b, q, s = (rng.uniform(low, high, (count, 1)) for low, high in ((0.3, 0.7), (-0.2, 0.2), (0, 1), (0, 1)))
        k = np.arange(self.set_size)
        x = np.broadcast_to(2 * k / (n - 1) - 1, (count, self.set_size))
        depth, present = a + b * x, k < n
        rows = (x, depth, np.broadcast_to(q, x.shape)), (x, np.where(s < q, depth, -depth), present)
        seen, elements = (np.stack(row, -1).astype(np.float32) * present[..., None] for row in rows)
        if not self.seen:
            return {"input": np.zeros_like(seen[:, :1]), "elements": elements}
        return {"input": seen, "input_mask": present, "elements": elements}
