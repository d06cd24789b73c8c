"""Random multisets to auto-encode."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World


class Multisets(World):
    """Sets of `set_size` elements of `set_dim` independent N(0, 1) numbers; the target is the input.

    The auto-encoding task of DSPN and iDSPN (Zhang et al., NeurIPS 2019 and ICLR 2022): published with 64,000 sets.

    Args:
        set_size, set_dim: n and d.
        arguments: those of `World`.
    """

    def __init__(self, *, set_size: int = 8, set_dim: int = 8, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.set_size, self.set_dim = set_size, set_dim

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        elements = rng.standard_normal((count, self.set_size, self.set_dim), dtype=np.float32)
        return {"input": elements, "elements": elements}
