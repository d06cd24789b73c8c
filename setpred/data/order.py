"""Which examples come when, for every process of a training, and going on in the middle of it."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class EpochOrder(DistributedSampler[int], ABC):
    """The numbers of the examples of an epoch, in order, dealt out to the processes that train together.

    Lightning calls `set_epoch` before every epoch, and leaves a `DistributedSampler` to do its own dealing.

    Args:
        length: examples of an epoch, of all processes together; what does not go round evenly is left out.

    Attributes: `first`, which of this process's examples to begin with; `len` counts those before it too.
    """

    def __init__(self, length: int) -> None:
        super().__init__(range(length), num_replicas=1, rank=0, shuffle=False)
        self.length, self.first = length, 0

    def deal(self, processes: int, process: int) -> None:
        """Takes every example whose place in the epoch is `process` modulo `processes`."""
        self.num_replicas, self.rank = processes, process

    @abstractmethod
    def numbers(self) -> Sequence[int]:
        """All `length` numbers of epoch `self.epoch` in order, the same in all processes."""

    def __len__(self) -> int:
        return self.length // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers()[self.rank :: self.num_replicas][self.first : len(self)])


class EpochPermutation(EpochOrder):
    """Each epoch another order of all examples, that depends on the seed and the epoch's number only.

    So a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, length: int, *, seed: int) -> None:
        super().__init__(length)
        self.seed = seed

    def numbers(self) -> Sequence[int]:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist()


class EpochRange(EpochOrder):
    """Each epoch begins where the one before ended: no number comes twice."""

    def numbers(self) -> Sequence[int]:
        return range(self.epoch * self.length, (self.epoch + 1) * self.length)


class ResumableLoader(DataLoader):
    """A loader of an `EpochOrder` that can go on within an epoch.

    Lightning saves `state_dict` in every checkpoint, and calls `load_state_dict` to go on from one that was saved in
    the middle of an epoch, be it with another batch size or number of processes.

    Attributes: `asked`, when the latest batch was asked for (`time.perf_counter`).
    """

    asked = 0.0
    _examples = 0  # of this epoch, handed out so far by all processes
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        # A generator, which asks for the order with the first batch only: when Lightning resumes, it takes the
        # iterator before it says which epoch it is for.
        resumed, self._resumed = self._resumed, None
        self._examples = resumed["examples"] if resumed and resumed["epoch"] == self._epoch else 0
        processes = getattr(self.sampler, "num_replicas", 1)
        if isinstance(self.sampler, EpochOrder):
            self.sampler.first = math.ceil(self._examples / processes)
        self.asked = time.perf_counter()
        for batch in super().__iter__():
            self._examples += self.batch_size * processes
            yield batch
            self.asked = time.perf_counter()

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)  # for `overfit_batches` Lightning puts a sampler of its own

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "examples": self._examples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = state
