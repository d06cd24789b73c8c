"""Order of the examples in every process of a training, resumable within an epoch.

`training_loader` and `validation_loader` make the loaders; `trainer` says how many processes there are and which of
them this is (`world_size`, `global_rank`), None is one process.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from setpred.errors import InputError


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


class InOrder(DistributedSampler[int]):
    """0, 1, ..., `length` - 1, of which each process has a block: every example exactly once, to validate on.

    The blocks of all processes, one after the other, are the whole; their lengths differ by one at most. (Torch's and
    Lightning's own dealing shows some examples twice where it does not go round evenly, and out of order.) So
    processes may have one batch more than others. That is safe in a validation: only the first forward pass of
    `DistributedDataParallel` after a training step waits for the others, and everyone has a first one.

    Raises:
        InputError: fewer examples than processes.
    """

    def __init__(self, length: int, *, processes: int, process: int) -> None:
        super().__init__(range(length), num_replicas=processes, rank=process, shuffle=False)
        if length < processes:
            raise InputError(
                f"expected at least one validation example for each of {processes} processes, got {length}; validate "
                "on more, or use fewer processes"
            )
        self.block = range(length * process // processes, length * (process + 1) // processes)

    def __len__(self) -> int:
        return len(self.block)

    def __iter__(self) -> Iterator[int]:
        return iter(self.block)


class ResumableLoader(DataLoader):
    """A loader of an `EpochOrder` that can resume within an epoch.

    Lightning saves `state_dict` in every checkpoint and calls `load_state_dict` on a resume.

    Attributes: `asked`, when the latest batch was asked for (`time.perf_counter`).

    Raises:
        InputError: resumed within an epoch with another batch size or number of processes.
    """

    asked = 0.0
    _batches = 0  # of this epoch, handed out so far by each process
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        # A generator, which asks for the order with the first batch only: when Lightning resumes, it takes the
        # iterator before it says which epoch it is for.
        resumed, self._resumed = self._resumed, None
        within = resumed is not None and resumed["epoch"] == self._epoch
        if within and any(resumed.get(name) != value for name, value in self._sizes.items()):
            raise InputError(
                f"expected batch_size {resumed.get('batch_size')} and {resumed.get('processes')} processes, as in this "
                f"checkpoint of within an epoch, got {self.batch_size} and {self._sizes['processes']}; resume with "
                "those of the checkpoint, or from the end of an epoch"
            )
        self._batches = resumed["batches"] if within else 0
        if isinstance(self.sampler, EpochOrder):
            self.sampler.first = self._batches * self.batch_size
        self.asked = time.perf_counter()
        for batch in super().__iter__():
            self._batches += 1
            yield batch
            self.asked = time.perf_counter()

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)  # for `overfit_batches` Lightning inserts another sampler

    @property
    def _sizes(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "processes": getattr(self.sampler, "num_replicas", 1)}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batches": self._batches} | self._sizes

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = state


def training_loader(data: Dataset, batch_size: int, order: EpochOrder, trainer: Any, **reading: Any) -> ResumableLoader:
    """This process's batches of `order`. The last, smaller batch is left out: it would have noisier batch statistics
    and another step size.

    Raises:
        InputError: no whole batch for each process.
    """
    processes, process = _among(trainer)
    if order.length < processes * batch_size:
        raise InputError(
            f"expected at least one batch of {batch_size} for each of {processes} processes, got {order.length} "
            "training examples; use a smaller batch_size, fewer processes or more examples"
        )
    order.deal(processes, process)
    return ResumableLoader(data, batch_size, sampler=order, drop_last=True, **reading)


def validation_loader(data: Dataset, batch_size: int, trainer: Any, **reading: Any) -> DataLoader:
    """All of `data` in order, of which each process has a part.

    Raises:
        InputError: fewer examples than processes.
    """
    processes, process = _among(trainer)
    sampler = InOrder(len(data), processes=processes, process=process) if processes > 1 else None
    return DataLoader(data, batch_size, sampler=sampler, **reading)


def _among(trainer: Any) -> tuple[int, int]:
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
