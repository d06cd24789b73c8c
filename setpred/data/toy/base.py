"""What the small worlds share: examples made from a seed, kept in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from setpred.data.dataset import Batch, as_batch
from setpred.data.loading import EpochPermutation, training_loader, validation_loader
from setpred.errors import InputError

SPLITS = ("train", "val")


class Examples(Dataset):
    """Arrays of equal length as a data set; `data.__getitems__([i, j, ...])` is a batch of tensors, with "index"."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @property
    def set_size(self) -> int:
        """Of the target sets."""
        return self.tensors["elements"].shape[1]

    def __len__(self) -> int:
        return len(self.tensors["elements"])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {name: values[index] for name, values in self.tensors.items()} | {"index": index}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([range(len(self))[index]]).items()}


class World(LightningDataModule, ABC):
    """A small task on sets that needs no download: examples are made from a seed when training begins.

    Batches hold the input set, `input` float32 `[batch, n, input_dim]`, perhaps `input_mask` bool `[batch, n]`, the
    target set `elements` float32 `[batch, set_size, dim]`, and `index` int64 `[batch]`. Subclasses write `examples`.

    Args:
        train_sets, val_sets: how many.
        batch_size: training examples per step and process; the last, smaller batch of an epoch is left out.
        eval_batch_size: validation examples at a time; as `batch_size` unless given.
        worlds_seed: which examples; those of training and of validation are drawn apart.
        seed: of the order of the training examples; None takes the seed of the run, from the command line.

    Raises:
        InputError: fewer than one batch of training examples, or no validation example.
    """

    def __init__(
        self,
        *,
        train_sets: int,
        val_sets: int,
        batch_size: int,
        eval_batch_size: int | None = None,
        worlds_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= batch_size <= train_sets or val_sets < 1:
            raise InputError(
                f"expected at least one batch of training sets and one validation set, got {train_sets} training sets "
                f"in batches of {batch_size} and {val_sets} validation sets"
            )
        self.counts = dict(zip(SPLITS, (train_sets, val_sets), strict=True))
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.worlds_seed, self.seed = worlds_seed, seed
        self.train_data: Examples | None = None
        self.val_data: Examples | None = None

    @abstractmethod
    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`count` examples of "train" or "val", by name, from the numbers of `rng` alone."""

    @property
    def input_dim(self) -> int:
        """Numbers of an element of the input; after `setup`."""
        assert self.val_data is not None, "setup comes first"
        return self.val_data.tensors["input"].shape[-1]

    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit") and self.train_data is None:
            self.train_data = self._made("train")
        if self.val_data is None:
            self.val_data = self._made("val")

    def train_dataloader(self) -> DataLoader:
        assert self.train_data is not None, "setup('fit') comes first"
        order = EpochPermutation(len(self.train_data), seed=self.seed or 0)
        return training_loader(self.train_data, self.batch_size, order, self.trainer, collate_fn=as_batch)

    def val_dataloader(self) -> DataLoader:
        assert self.val_data is not None, "setup comes first"
        return validation_loader(self.val_data, self.eval_batch_size, self.trainer, collate_fn=as_batch)

    def _made(self, split: str) -> Examples:
        rng = np.random.default_rng([self.worlds_seed, SPLITS.index(split)])
        return Examples(self.examples(split, self.counts[split], rng))
