"""Data sets: one batch convention, the same examples however they are read."""

import os
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from setpred import CLEVR, InputError
from setpred.data.dataset import SetFile, as_batch, fitting_workers
from setpred.data.hdf5 import open_set_file
from setpred.data.scenes import render_file
from setpred.sets import check_set, presence_mask

IMAGES = 11


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.h5"
    render_file(path, images=IMAGES, image_size=16, objects=(0, 4), seed=1)
    return path


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_is_what_the_file_holds(path, in_memory):
    data = SetFile(path, in_memory=in_memory)
    index = [7, 0, 10, 7]
    batch = data.__getitems__(index)
    check_set(batch["elements"], batch["mask"], set_dim=CLEVR.set_dim)
    with open_set_file(path) as file:
        np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1), file["images"][:][index])
        np.testing.assert_array_equal(batch["elements"], file["elements"][:][index])
        np.testing.assert_array_equal(data.camera(7), file["camera"][7])
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["elements"].dtype == torch.float32
    assert torch.equal(batch["mask"], presence_mask(batch["elements"]))
    assert batch["index"].tolist() == index
    assert (len(data), data.image_size, data.set_size) == (IMAGES, 16, CLEVR.max_objects)


def test_an_item_is_a_row_of_a_batch(path):
    data = SetFile(path)
    batch = data.__getitems__([3, 10])
    for row, index in ((0, 3), (1, 10), (1, -1)):
        assert same(data[index], {name: value[row] for name, value in batch.items()})
    for index in (IMAGES, -IMAGES - 1):
        with pytest.raises(IndexError):
            data[index]


def test_a_batch_is_its_own(path):
    data = SetFile(path, in_memory=True)
    before = data.__getitems__([2])
    changed = data.__getitems__([2])
    for value in changed.values():
        value.zero_()
    assert same(data.__getitems__([2]), before)


@pytest.mark.parametrize(("context", "in_memory"), [("fork", True), ("fork", False), ("spawn", True)])
def test_workers_read_what_the_process_reads(path, in_memory, context):
    data = SetFile(path, in_memory=in_memory)
    expected = list(DataLoader(data, batch_size=4, collate_fn=as_batch))  # opens the file here before it is sent
    loader = DataLoader(data, batch_size=4, collate_fn=as_batch, num_workers=2, multiprocessing_context=context)
    got = list(loader)
    assert [len(batch["index"]) for batch in got] == [4, 4, 3]
    assert all(same(one, other) for one, other in zip(got, expected, strict=True))


def test_there_are_as_many_workers_as_shared_memory_has_room_for(path, monkeypatch):
    data = SetFile(path)
    batch = 4 * sum(value.nbytes for value in data.__getitems__([0]).values())
    for free, expected in ((0, 0), (3 * batch - 1, 0), (3 * batch, 1), (5 * batch, 2), (7 * batch, 3), (99 * batch, 3)):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        with nullcontext() if expected == 3 else pytest.warns(UserWarning, match=f"reading in {expected} .*shm-size"):
            assert fitting_workers(3, data, 4) == expected
    assert fitting_workers(0, data, 4) == 0


def test_a_pickle_holds_neither_handle_nor_images(path):
    data = SetFile(path, in_memory=True)
    expected = data.__getitems__(range(IMAGES))
    sent = pickle.dumps(data)
    assert len(sent) < IMAGES * 16 * 16 * 3 + data.__getitems__(range(IMAGES))["elements"].nbytes
    assert same(pickle.loads(sent).__getitems__(range(IMAGES)), expected)


def test_sets_take_the_size_of_the_model(path):
    own = SetFile(path).__getitems__(range(IMAGES))
    for set_size in (4, 13):
        data = SetFile(path, set_size=set_size)
        batch = data.__getitems__(range(IMAGES))
        assert batch["elements"].shape == (IMAGES, set_size, CLEVR.set_dim)
        shared = min(set_size, CLEVR.max_objects)
        assert torch.equal(batch["elements"][:, :shared], own["elements"][:, :shared])
        assert not batch["elements"][:, shared:].any()
        assert torch.equal(batch["mask"].sum(1), own["mask"].sum(1))


def test_the_first_images_only(path):
    data = SetFile(path, images=3)
    assert len(data) == 3
    assert same(data.__getitems__([2, 0]), SetFile(path).__getitems__([2, 0]))
    assert len(SetFile(path, images=1000)) == IMAGES
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        SetFile(path, images=0)
