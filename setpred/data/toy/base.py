"""Base class of the toy tasks: examples made from a seed, kept in memory."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from setpred.data.datamodule import SetData
from setpred.data.dataset import Batch
from setpred.errors import InputError

SPLITS = ("train", "val")


class Examples(Dataset):
    """Arrays of equal length as a data set; `data.__getitems__([i, j, ...])` is a batch of tensors, with "index"."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @property
    def set_size(self) -> int:
        """Size of the target sets."""
        return self.tensors["elements"].shape[1]

    def __len__(self) -> int:
        return len(self.tensors["elements"])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {name: values[index] for name, values in self.tensors.items()} | {"index": index}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([range(len(self))[index]]).items()}


class World(SetData):
    """A small task on sets: examples are made from a seed when training starts.

    Batches hold the input set, `input` float32 `[batch, n, input_dim]`, perhaps `input_mask` bool `[batch, n]`, the
    target set `elements` float32 `[batch, set_size, dim]`, and `index` int64 `[batch]`. Subclasses write `examples`.

    Args:
        train_sets, val_sets: number of examples.
        worlds_seed: seed of the examples; training and validation examples are drawn apart.
        arguments: those of `SetData`.
    """

    def __init__(self, *, train_sets: int, val_sets: int, worlds_seed: int = 0, **arguments: Any) -> None:
        super().__init__(**arguments)
        if min(train_sets, val_sets) < 1:
            raise InputError(f"expected at least 1 training and 1 validation set, got {train_sets} and {val_sets}")
        self.counts = dict(zip(SPLITS, (train_sets, val_sets), strict=True))
        self.worlds_seed = worlds_seed

    @abstractmethod
    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`count` examples of "train" or "val", by name, from the numbers of `rng` alone."""

    @property
    def input_dim(self) -> int:
        """Numbers of an element of the input; after `setup`."""
        assert self.val_data is not None, "setup comes first"
        return self.val_data.tensors["input"].shape[-1]

    def open_split(self, split: str) -> Examples:
        rng = np.random.default_rng([self.worlds_seed, SPLITS.index(split)])
        return Examples(self.examples(split, self.counts[split], rng))
