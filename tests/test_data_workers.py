"""Workers of data loaders: the same batches however many there are, however they start, whatever was read before."""

import os
import threading

import pytest
import torch
from torch.utils.data import get_worker_info

from setpred.data.datamodule import SetDataModule
from setpred.data.dataset import SetFile
from setpred.data.scenes import render_file
from setpred.data.streamed import StreamedScenes

IMAGES = 300  # more than are read at a time

# so many processes, started so; those that are not forked import torch first
ordinary = [("fork", 2), ("fork", 4)]
slow = [(method, workers) for method in ("spawn", "forkserver") for workers in (2, 4)]
started = pytest.mark.parametrize(
    ("method", "workers"), [*ordinary, *(pytest.param(*each, marks=pytest.mark.slow) for each in slow)]
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.h5"
    render_file(path, images=IMAGES, image_size=16, objects=(0, 4), seed=1, workers=0)
    return str(path)


def module(path, *, in_memory, workers=0):
    data = SetDataModule(path, path, image_size=16, batch_size=16, num_workers=workers, in_memory=in_memory, seed=3)
    data.setup("fit")
    return data


def batches(data, method=None, epochs=(0, 1)):
    """All training batches of two epochs, then those of the validation."""
    training, validation = data.train_dataloader(), data.val_dataloader()
    for loader in (training, validation):
        if method is not None and loader.num_workers:
            loader.multiprocessing_context = method
    found = []
    for epoch in epochs:
        training.sampler.set_epoch(epoch)
        found += list(training)
    return found + list(validation)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        assert all(torch.equal(value, its[name]) for name, value in mine.items())


@started
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_of_a_file_do_not_depend_on_the_workers(path, method, workers, in_memory):
    """Also where this process has opened and read the files before the workers begin, and while they read."""
    expected = batches(module(path, in_memory=True))
    data = module(path, in_memory=in_memory, workers=workers)
    for part in (data.train_data, data.val_data):
        part.__getitems__([0, 5, IMAGES - 1])
    stop, wrong = threading.Event(), []

    def read():
        whole = torch.cat([batch["image"] for batch in expected[-19:]])
        while not stop.wait(0.01):
            wrong.extend(
                [number for number in (7, 160) if not torch.equal(data.train_data[number]["image"], whole[number])]
            )

    reading = threading.Thread(target=read)
    reading.start()
    try:
        assert_same(batches(data, method), expected)
    finally:
        stop.set()
        reading.join()
    assert wrong == []


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), pytest.param("spawn", 2, marks=pytest.mark.slow)])
def test_streamed_scenes_do_not_depend_on_the_workers(tmp_path, method, workers):
    options = {"scenes_per_epoch": 24, "val_images": 2, "image_size": 16, "objects": (3, 4), "batch_size": 4}

    def shown(workers):
        data = StreamedScenes(**options, folder=str(tmp_path), workers=0, num_workers=workers, seed=3)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        if workers:
            loader.multiprocessing_context = method
        return [data.on_after_batch_transfer(batch) for batch in loader]

    assert_same(shown(workers), shown(0))


class Descriptors(SetFile):
    """Moves the file's place in each worker, and says which worker it was."""

    def __getitems__(self, indices):
        super().__getitems__(indices)
        assert get_worker_info() is not None
        os.lseek(self._handle.id.get_vfd_handle(), 4321, os.SEEK_SET)
        return torch.tensor(indices)


def test_a_forked_worker_does_not_share_the_open_file(path):
    """Not even where two data sets of this process have it open."""
    other, data = SetFile(path, in_memory=False), Descriptors(path, in_memory=False)
    for part in (other, data):
        SetFile.__getitems__(part, [1])
    place = [os.lseek(part._handle.id.get_vfd_handle(), 0, os.SEEK_CUR) for part in (other, data)]
    loader = torch.utils.data.DataLoader(data, 8, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    assert sorted(int(number) for batch in loader for number in batch) == list(range(IMAGES))
    assert place == [os.lseek(part._handle.id.get_vfd_handle(), 0, os.SEEK_CUR) for part in (other, data)]
    assert torch.equal(other[3]["image"], SetFile.__getitems__(data, [3])["image"][0])


def test_threads_may_share_a_data_set(path):
    expected, data = SetFile(path).__getitems__(range(IMAGES))["image"], SetFile(path, in_memory=False)
    wrong = []

    def read(start):
        for number in range(start, IMAGES, 4):
            if not torch.equal(data[number]["image"], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
