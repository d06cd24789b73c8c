"""Orders of examples: of an epoch, of each process, and after a resume within an epoch."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import BatchSampler

from setpred.data.loading import (
    EpochPermutation,
    EpochRange,
    InOrder,
    ResumableLoader,
    training_loader,
    validation_loader,
)
from setpred.errors import InputError

ORDERS = [lambda length: EpochPermutation(length, seed=3), EpochRange]


def numbers(order, epoch=0, processes=1, process=0):
    order.set_epoch(epoch)
    order.deal(processes, process)
    return list(order)


def test_a_permutation_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return numbers(EpochPermutation(50, seed=seed), epoch)

    assert sorted(order(0, 0)) == list(range(50))
    assert order(3, 7) == order(3, 7)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9

    order = EpochRange(7)
    assert [number for epoch in range(4) for number in numbers(order, epoch)] == list(range(28))


@pytest.mark.parametrize("make", ORDERS)
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_an_epoch_without_overlap(make, processes):
    """Together the k-th batches of all processes are the k-th batch of one process."""
    length, size = 31, 3
    whole = numbers(make(length), 2)
    batches = []
    for process in range(processes):
        order = make(length)
        dealt = numbers(order, 2, processes, process)
        assert len(dealt) == len(order) == length // processes
        batches.append(list(BatchSampler(order, size, drop_last=True)))
    steps = [sorted(chain(*step)) for step in zip(*batches, strict=True)]
    assert steps == [sorted(step) for step in BatchSampler(whole, size * processes, drop_last=True)]


@pytest.mark.parametrize("make", ORDERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_another_was(make, workers):
    def loader():
        return ResumableLoader(np.arange(60), 4, sampler=make(30), num_workers=workers, drop_last=True)

    def shown(loader, epoch):
        loader.sampler.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    whole = shown(loader(), 1)
    assert len(whole) == 7
    stopped = loader()
    stopped.sampler.set_epoch(1)
    for place, _ in enumerate(stopped, start=1):
        if place == 3:
            break
    again = loader()
    again.load_state_dict(stopped.state_dict())
    assert len(again) == 7
    assert shown(again, 1) == whole[3:]
    assert shown(again, 1) == whole
    again.load_state_dict(stopped.state_dict())
    assert shown(again, 0) == shown(loader(), 0)  # the state is of another epoch


@pytest.mark.parametrize(("size", "processes"), [(2, 2), (4, 1)])
def test_a_resume_within_an_epoch_needs_the_same_batch_size_and_processes(size, processes):
    def loader(size, processes):
        order = EpochRange(30)
        order.set_epoch(1)
        order.deal(processes, 0)
        return ResumableLoader(np.arange(60), size, sampler=order, drop_last=True)

    stopped = loader(4, 2)
    next(iter(stopped))
    again = loader(size, processes)
    again.load_state_dict(stopped.state_dict())
    with pytest.raises(InputError, match=f"expected batch_size 4 and 2 processes.*got {size} and {processes}; resume"):
        next(iter(again))


@pytest.mark.parametrize(("length", "processes"), [(1, 1), (13, 2), (12, 2), (13, 5), (5, 5), (64, 7)])
def test_blocks_are_the_whole_in_order_and_as_even_as_can_be(length, processes):
    blocks = [InOrder(length, processes=processes, process=process) for process in range(processes)]
    assert list(chain(*blocks)) == list(range(length))
    lengths = {len(block) for block in blocks}
    assert max(lengths) - min(lengths) <= 1
    assert [len(block) for block in blocks] == [len(list(block)) for block in blocks]


def test_each_process_has_something_to_do_or_there_is_a_sentence():
    def among(processes):
        return SimpleNamespace(world_size=processes, global_rank=0)

    data, order = np.arange(7), EpochRange(7)
    assert len(training_loader(data, 3, order, among(2))) == 1
    with pytest.raises(InputError, match="at least one batch of 4 for each of 2 processes, got 7 training examples"):
        training_loader(data, 4, order, among(2))
    assert len(validation_loader(data, 4, among(7))) == 1
    with pytest.raises(InputError, match="at least one validation example for each of 8 processes, got 7"):
        validation_loader(data, 4, among(8))
