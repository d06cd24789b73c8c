"""Points whose places and kinds are known up to a noise of known distribution."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError


class UncertainPoints(World):
    """Points that are seen with noise; the target is where they are, and of which kind.

        position = seen + σ(seen) N(0, 1),    σ(seen) = least + (most - least) |seen|² / 2

    for each coordinate. So the quantile of level τ of a coordinate is seen + σ(seen) Φ⁻¹(τ): what a model should
    predict, and how well it can do, is known. The seen points are near the centres of different cells of a grid of 3x3
    over [-1, 1]², several σ apart, so that a matching by distance finds the pairs.

    An element of the input is [x, y, kind], the seen position and one of two kinds, one-hot. A target is [x, y] once
    for each of `copies`, kind, and presence 1. Each kind is seen wrongly with probability `mistaken`.

    Args:
        set_size: points of a set, up to 9.
        noise: least and most σ.
        mistaken: share of the kinds that are seen wrongly.
        copies: how often a target has its position: once for each field of quantiles.
        arguments: those of `World`.
    """

    def __init__(
        self,
        *,
        set_size: int = 6,
        noise: tuple[float, float] = (0.01, 0.1),
        mistaken: float = 0.1,
        copies: int = 3,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if not (1 <= set_size <= 9 and 0 <= noise[0] <= noise[1] and 0 <= mistaken <= 1 and copies >= 1):
            raise InputError(
                "expected a set_size from 1 to 9, the least and the most noise, mistaken from 0 to 1 and copies of at "
                f"least 1, got {set_size}, {list(noise)}, {mistaken} and {copies}"
            )
        self.set_size, self.noise, self.mistaken, self.copies = set_size, tuple(noise), mistaken, copies

    def deviation(self, seen: np.ndarray) -> np.ndarray:
        """σ of seen positions `[..., 2]`, as `[..., 1]`."""
        least, most = self.noise
        return least + (most - least) * np.square(seen).sum(-1, keepdims=True) / 2

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        cells = rng.random((count, 9)).argsort(1)[:, : self.set_size]
        centres = (np.stack(np.divmod(cells, 3), -1) - 1) * (2 / 3)
        seen = centres + rng.uniform(-0.15, 0.15, centres.shape)
        places = seen + self.deviation(seen) * rng.standard_normal(seen.shape)
        kinds = rng.integers(2, size=cells.shape)
        shown = np.where(rng.random(cells.shape) < self.mistaken, 1 - kinds, kinds)
        one_hot, presence = np.eye(2), np.ones((*cells.shape, 1))
        elements = np.concatenate([*[places] * self.copies, one_hot[kinds], presence], axis=-1)
        inputs = np.concatenate([seen, one_hot[shown]], axis=-1)
        return {"input": inputs.astype(np.float32), "elements": elements.astype(np.float32)}
