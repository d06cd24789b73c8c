"""Three marked cells of a map, whose places are asked for: a probe of positions."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError


class ThreeCells(World):
    """Maps with three different marked cells a, b and c; the target is where they are, a set of one element.

        [|a - b|, |b - c|, |c - a|, b - a, a],    with places (row, column) / (side - 1) from 0 to 1

    seven numbers: relative positions without and with a direction, and an absolute one. The input has the cells row by
    row, each with three numbers, of which one is 1 in a marked cell. So a model that does not know the positions of its
    tokens can only guess. After the three-cell experiment of LOOPE (Chowdhury, Rahman, Taki, 2025), whose questions may
    differ in detail.

    Args:
        side: cells of a row, at least 2.
        unseen: share of the cells that are never marked in training.
        arguments: those of `World`.
    """

    def __init__(self, *, side: int = 8, unseen: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        if side < 2 or not 0 <= unseen < 1 or side**2 - round(unseen * side**2) < 3:
            raise InputError(f"expected a side of at least 2 cells and 3 seen cells, got {side} and unseen {unseen}")
        self.side, self.unseen = side, unseen

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        seen = np.random.default_rng(self.worlds_seed).permutation(self.side**2)
        if split == "train":
            seen = seen[round(self.unseen * len(seen)) :]
        cells = seen[rng.random((count, len(seen))).argsort(1)[:, :3]]
        marks = np.zeros((count, self.side**2, 3), np.float32)
        marks[np.arange(count)[:, None], cells, np.arange(3)] = 1
        place = np.stack(np.divmod(cells, self.side), -1) / (self.side - 1)
        a, b, c = place.swapaxes(0, 1)
        apart = [np.linalg.norm(one - other, axis=-1, keepdims=True) for one, other in ((a, b), (b, c), (c, a))]
        target = np.concatenate([*apart, b - a, a], axis=-1)
        return {"input": marks, "elements": target[:, None].astype(np.float32)}
