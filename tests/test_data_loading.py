"""Data sets and modules: the same batches however they are read; built-in scenes in files and streamed."""

import csv
import os
import pickle
import shlex
import socket
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import CONFIG, QUIET
from torch.utils.data import DataLoader, get_worker_info

from setpred import CLEVR, InputError
from setpred.__main__ import main as program
from setpred.commands.evaluate import evaluate
from setpred.commands.train import build, train
from setpred.data import dataset
from setpred.data.datamodule import RenderedFile, RenderedScenes, SetDataModule
from setpred.data.dataset import LONGEST_TEMPORARY, SetFile, fitting_workers
from setpred.data.hdf5 import file_header, open_set_file
from setpred.data.loading import EpochPermutation
from setpred.data.scenes import render_command, render_file, render_folder, rendered_header, rendered_name
from setpred.data.streamed import STREAM, StreamedScenes
from setpred.rendering.renderer import render
from setpred.rendering.sampling import COGENT_A
from setpred.sets import check_set, presence_mask

IMAGES, VAL_IMAGES, BLOCK = 31, 11, 10  # more images than are read at a time
CPU = torch.device("cpu")
DEVICES = [CPU, *[torch.device("cuda", 0)] * torch.cuda.is_available()]
STREAMED = {"scenes_per_epoch": 14, "val_images": 4, "image_size": 16, "objects": (0, 2), "batch_size": 4, "workers": 0}
SCENES = {"train_images": 6, "val_images": 4, "image_size": 16, "objects": (0, 2), "batch_size": 3, "workers": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, images in (("train", IMAGES), ("val", VAL_IMAGES)):
        render_file(folder / f"{name}.h5", images=images, image_size=16, objects=(0, 3), seed=images)
    return str(folder / "train.h5"), str(folder / "val.h5")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def streamed_folder(tmp_path_factory):
    """A folder with the validation scenes of `STREAMED`."""
    folder = str(tmp_path_factory.mktemp("streamed"))
    prepare(StreamedScenes(**STREAMED, folder=folder))
    return folder


def prepare(data) -> None:
    """`prepare_data`, but rendering in this process: starting another one takes longer than the rest."""
    for file in data.files:
        which = {name: value for name, value in file.header.source.items() if name != "kind"}
        size = {"images": file.header.images, "image_size": file.header.image_size, "masks": file.header.instances}
        render_file(file.path, **size, **which)
    data.prepare_data()


def module(files, *, device=CPU, ranks=1, rank=0, stage="fit", **options) -> SetDataModule:
    data = SetDataModule(*files, **{"image_size": 16, "batch_size": 5, "seed": 3} | options)
    loaders = {"train_dataloader": None, "val_dataloaders": None}
    strategy = SimpleNamespace(root_device=device)
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, strategy=strategy, **loaders)
    data.setup(stage)
    return data


def stream(folder, **options) -> StreamedScenes:
    data = StreamedScenes(**STREAMED | options)
    data.val_path = StreamedScenes(**STREAMED, folder=folder).val_path  # one file for all: it is not what is tested
    data.setup("fit")
    return data


def streamed(data: StreamedScenes, epochs=1, first=0):
    """The batches of these epochs, as a training step gets them."""
    loader = data.train_dataloader()
    for epoch in range(first, first + epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield data.on_after_batch_transfer(batch, 0)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.cpu(), other[name].cpu()) for name, value in one.items()
    )


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    assert all(same(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_is_what_the_file_holds(files, in_memory):
    data = SetFile(files[0], in_memory=in_memory)
    index = [7, 0, 30, 7]
    batch = data.__getitems__(index)
    check_set(batch["elements"], batch["mask"], set_dim=CLEVR.set_dim)
    with open_set_file(files[0]) as file:
        np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1), file["images"][:][index])
        np.testing.assert_array_equal(batch["elements"], file["elements"][:][index])
        np.testing.assert_array_equal(data.camera(7), file["camera"][7])
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["mask"], presence_mask(batch["elements"]))
    assert batch["index"].tolist() == index
    assert (len(data), data.image_size, data.set_size) == (IMAGES, 16, CLEVR.max_objects)
    for row, number in ((0, 7), (2, 30), (2, -1)):
        assert same(data[number], {name: value[row] for name, value in batch.items()})
    for number in (IMAGES, -IMAGES - 1):
        with pytest.raises(IndexError):
            data[number]
    for value in data.__getitems__(index).values():  # a batch is a copy
        value.zero_()
    assert same(data.__getitems__(index), batch)


def test_a_pickle_holds_neither_handle_nor_images(files):
    data = SetFile(files[0], in_memory=True)
    expected = data.__getitems__(range(IMAGES))
    sent = pickle.dumps(data)
    assert len(sent) < IMAGES * 16 * 16 * 3 + expected["elements"].nbytes
    assert same(pickle.loads(sent).__getitems__(range(IMAGES)), expected)


def test_sets_take_the_size_of_the_model(files):
    own = SetFile(files[0]).__getitems__(range(IMAGES))
    for set_size in (4, 13):
        batch = SetFile(files[0], set_size=set_size).__getitems__(range(IMAGES))
        assert batch["elements"].shape == (IMAGES, set_size, CLEVR.set_dim)
        shared = min(set_size, CLEVR.max_objects)
        assert torch.equal(batch["elements"][:, :shared], own["elements"][:, :shared])
        assert not batch["elements"][:, shared:].any()
        assert torch.equal(batch["mask"].sum(1), own["mask"].sum(1))


def test_the_first_images_only(files):
    data = SetFile(files[0], images=3)
    assert len(data) == 3
    assert same(data.__getitems__([2, 0]), SetFile(files[0]).__getitems__([2, 0]))
    assert len(SetFile(files[0], images=1000)) == IMAGES
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        SetFile(files[0], images=0)


class Descriptors(SetFile):
    """Moves the file's position in each worker."""

    def __getitems__(self, indices):
        super().__getitems__(indices)
        assert get_worker_info() is not None
        os.lseek(self._handle.id.get_vfd_handle(), 4321, os.SEEK_SET)
        return torch.tensor(indices)


def test_a_forked_worker_does_not_share_the_open_file(files):
    """Not even where two data sets of this process have it open."""
    other, data = SetFile(files[0], in_memory=False), Descriptors(files[0], in_memory=False)
    for part in (other, data):
        SetFile.__getitems__(part, [1])
    place = [os.lseek(part._handle.id.get_vfd_handle(), 0, os.SEEK_CUR) for part in (other, data)]
    loader = DataLoader(data, 8, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    assert sorted(int(number) for batch in loader for number in batch) == list(range(IMAGES))
    assert place == [os.lseek(part._handle.id.get_vfd_handle(), 0, os.SEEK_CUR) for part in (other, data)]
    assert torch.equal(other[3]["image"], SetFile.__getitems__(data, [3])["image"][0])


def test_a_long_name_of_the_folder_of_temporary_files_leaves_no_worker(files, tmp_path, monkeypatch):
    """Torch binds a socket in it for each batch; Linux allows names of 107 bytes."""
    data, folder = SetFile(files[0]), tmp_path / ("x" * (LONGEST_TEMPORARY - len(os.fsencode(tmp_path)) - 1))
    for path, expected in ((folder, 2), (f"{folder}y", 0)):
        monkeypatch.setattr(tempfile, "tempdir", str(path))
        with nullcontext() if expected else pytest.warns(UserWarning, match="reading in 0 .*TMPDIR"):
            assert fitting_workers(2, data, 4) == expected
    with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match="too long"):
        listener.bind(f"{folder}y/pymp-abcdefgh/listener-abcdefgh")


def test_there_are_as_many_workers_as_shared_memory_has_room_for(files, monkeypatch):
    data = SetFile(files[0])
    batch = 4 * sum(value.nbytes for value in data.__getitems__([0]).values())
    loaders = module(files, num_workers=2)
    for free, expected in ((0, 0), (3 * batch - 1, 0), (3 * batch, 1), (5 * batch, 2), (7 * batch, 3), (99 * batch, 3)):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        with nullcontext() if expected == 3 else pytest.warns(UserWarning, match=f"reading in {expected} .*shm-size"):
            assert fitting_workers(3, data, 4) == expected
    assert loaders.train_dataloader().num_workers == loaders.val_dataloader().num_workers == 2
    assert fitting_workers(0, data, 4) == 0
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    with pytest.warns(UserWarning, match="shm-size"):
        assert loaders.train_dataloader().num_workers == loaders.val_dataloader().num_workers == 0


def test_training_batches_are_full_and_validation_is_in_order(files):
    data = module(files, eval_batch_size=4, seed=None)
    batches = [batch["index"] for batch in data.train_dataloader()]
    assert [len(batch) for batch in batches] == [5] * 6
    assert torch.cat(batches).tolist() == list(EpochPermutation(IMAGES, seed=0))[:30]
    seen = [batch["index"].tolist() for batch in data.val_dataloader()]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_only_what_is_asked_for(files):
    data = module((None, files[1]), val_images=3, stage="validate")
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2]]
    with pytest.raises(InputError, match="no training part"):
        data.setup("fit")
    with pytest.raises(InputError, match=r"at least one batch of 5 .*, got 3 training examples"):
        module(files, train_images=3).train_dataloader()
    for name in ("batch_size", "num_workers", "seed"):
        with pytest.raises(InputError, match=f"expected {name} of at least"):
            module(files, **{name: -1})


WAYS = [  # in_memory, workers, how they start; those that are not forked import torch first
    *((where, 2, "fork") for where in (False, True)),
    *((where, 0, None) for where in (True, None, "device")),
    pytest.param(False, 4, "fork", marks=pytest.mark.slow),
    *(
        pytest.param(where, 2, how, marks=pytest.mark.slow)
        for where in (False, True)
        for how in ("spawn", "forkserver")
    ),
]


@pytest.mark.parametrize(("in_memory", "workers", "how"), WAYS)
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_batches_do_not_depend_on_how_they_are_read(files, in_memory, workers, how, rank, device):
    """Two epochs, one resumed within, and a validation; while this process has the file open, and a thread reads it."""
    among = {} if rank is None else {"ranks": 2, "rank": rank}
    data = module(files, in_memory=in_memory, num_workers=workers, device=device, **among)
    for part in (data.train_data, data.val_data):
        part.__getitems__([0, 5, 10])

    def batches(data):
        training, validation = data.train_dataloader(), data.val_dataloader()
        assert training.pin_memory == (device.type == "cuda" and data.in_memory != "device")
        for loader in (training, validation):
            if loader.num_workers:
                loader.multiprocessing_context = how
        for epoch in (0, 1):
            training.sampler.set_epoch(epoch)
            for number, batch in enumerate(training):
                yield batch
                if number == 1:
                    state = training.state_dict()
        training.load_state_dict(state)
        yield from training
        yield from validation

    expected = list(batches(module(files, in_memory=False, device=device, **among)))
    pictures = SetFile(files[0]).__getitems__(range(IMAGES))["image"]
    stop, wrong = threading.Event(), []

    def read():
        while not stop.wait(0.01):
            wrong.extend(n for n in (7, 30) if not torch.equal(data.train_data[n]["image"].cpu(), pictures[n]))

    reading = threading.Thread(target=read)
    reading.start()
    try:
        found = list(batches(data))
    finally:
        stop.set()
        reading.join()
    assert_same(found, expected)
    assert all(
        ours[name].stride() == its[name].stride() for ours, its in zip(found, expected, strict=True) for name in its
    )
    assert wrong == []
    if in_memory == "device":
        moved = data.transfer_batch_to_device(found[0], device, 0)
        assert moved["image"].data_ptr() == found[0]["image"].data_ptr()


def test_images_that_the_device_cannot_keep(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (IMAGES * 16 * 16 * 3 - 1, 10**9))
    data = SetFile(files[0])
    with pytest.raises(InputError, match=r"31 images of .* take 0.0 GB, but cuda:0 has 0.0 GB free; .*in_memory: true"):
        data.load(torch.device("cuda", 0))
    assert data[0]["image"].device == CPU
    render_folder(tmp_path, split="val", images=1, objects=(3, 3), width=48, height=32)
    with pytest.raises(InputError, match=r"is a folder; make a file of it with `setpred data prepare`"):
        module((None, str(tmp_path)), in_memory="device", stage="validate")


@pytest.mark.parametrize("device", [None, CPU], ids=str)
def test_a_set_that_failed_to_load_has_no_images(files, monkeypatch, device):
    data = SetFile(files[0], in_memory=True)
    with monkeypatch.context() as damage:
        damage.setattr(dataset, "read_inputs", lambda file, index: (_ for _ in ()).throw(OSError("checksum")))
        with pytest.raises(InputError, match="is damaged"):
            data.load(device)
        with pytest.raises(InputError, match="is damaged"):
            data[0]
    torch.testing.assert_close(data[0]["image"], SetFile(files[0], in_memory=False)[0]["image"])


class Watch(LightningModule):
    """Learns nothing and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[list[int]] = []

    def training_step(self, batch, _):
        assert batch["image"].dtype == torch.uint8
        self.shown.append([self.current_epoch, int(batch["image"].sum()), *batch["index"].tolist()])
        return self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, epochs=2, *, checkpoint=None, folder=None) -> list[list[int]]:
    """Train, with a checkpoint of every step in `folder`; return what was shown."""
    model, name = Watch(), {"filename": "{step}", "auto_insert_metric_name": False}
    keep = [] if folder is None else [ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, **name)]
    trainer = Trainer(max_epochs=epochs, callbacks=keep, **QUIET | {"enable_checkpointing": bool(keep)})
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model.shown


@pytest.mark.parametrize("kind", ["file", "workers", "device", "streamed", "streamed workers"])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(files, streamed_folder, tmp_path, kind):
    def data(**options):
        workers = {"num_workers": 2 if "workers" in kind else 0}
        if "streamed" in kind:
            return StreamedScenes(**STREAMED | workers | options, folder=streamed_folder)
        in_memory = "device" if kind == "device" else None
        return SetDataModule(*files, **{"image_size": 16, "batch_size": 8, "in_memory": in_memory} | workers | options)

    whole = fit(data(), folder=tmp_path)
    assert len(whole) == 6
    if "streamed" in kind:
        assert [number for _, _, *numbers in whole for number in numbers] == [*range(12), *range(14, 26)]
        with pytest.raises(InputError, match="scenes_per_epoch was 14 before and is 8 now"):
            fit(data(scenes_per_epoch=8), checkpoint=str(tmp_path / "3.ckpt"))
    else:
        assert len({tuple(sorted(step[2:])) for step in whole}) == 6  # another order each epoch
        assert fit(data(seed=1), 1) != whole[:3]
    for step in (2, 3, 4):  # the third is the last of its epoch
        assert whole[:step] + fit(data(), checkpoint=str(tmp_path / f"{step}.ckpt")) == whole


def test_built_in_scenes_are_rendered_once(tmp_path, monkeypatch):
    """By jobs that start together, of which one renders; then found."""
    rendered, really = [], RenderedFile._render

    def slow(file):
        rendered.append(file.path)
        time.sleep(0.5)  # longer than the first look at the lock
        really(file)

    monkeypatch.setattr(RenderedFile, "_render", slow)
    data = RenderedScenes(**SCENES, folder=str(tmp_path / "data"))
    jobs = [threading.Thread(target=data.prepare_data) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    names = ["rendered-16-0to2-seed0-6.h5", "rendered-16-0to2-seed1000000-4.h5"]
    assert [Path(path).name for path in rendered] == sorted(os.listdir(tmp_path / "data")) == names
    train, val = (SetFile(tmp_path / "data" / name) for name in names)
    assert not any(torch.equal(a["image"], b["image"]) for a in train for b in val)

    again = RenderedScenes(**SCENES | {"batch_size": 2, "seed": 5}, folder=str(tmp_path / "data"))
    again.prepare_data()
    again.setup("fit")
    assert [len(again.train_data), len(again.val_data)] == [6, 4]
    assert len(rendered) == 2


@pytest.mark.parametrize("which", [{}, {"condition": "cogent-a"}, {"views": 2}, {"masks": True}])
def test_the_command_that_makes_a_file_is_that_of_its_name(which, tmp_path, monkeypatch):
    header = rendered_header(images=4, image_size=16, objects=(0, 2), seed=7, **which)
    path = tmp_path / "my data" / rendered_name(header)
    monkeypatch.setattr(sys, "argv", [*shlex.split(render_command(path)), "--workers", "0"])
    assert program() == 0
    assert file_header(path) == header
    assert render_command("scenes.h5") is None


def test_a_wrong_file_under_the_name_is_not_used(tmp_path, monkeypatch):
    data = RenderedScenes(**SCENES, folder=str(tmp_path))
    prepare(data)
    path = Path(data.train_path)
    content = path.read_bytes()
    path.write_bytes(content[:9000])
    with pytest.raises(InputError, match="cut short"):
        data.prepare_data()
    render_file(path, images=6, image_size=16, objects=(0, 2), seed=4, force=True)
    with pytest.raises(InputError, match=r"expected 6 images of .*'seed': 0.* got 6 of .*'seed': 4"):
        data.prepare_data()
    path.write_bytes(content)
    brighter = lambda scenes, **size: 9 + 0 * render(scenes, **size)  # noqa: E731
    monkeypatch.setattr("setpred.data.scenes.render", brighter)
    with pytest.raises(InputError, match="another version of the renderer"):
        data.prepare_data()


def test_a_rendering_that_fails_is_reported(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(InputError, match="a file, not a folder"):
        RenderedScenes(**SCENES, folder=str(tmp_path / "data")).prepare_data()
    monkeypatch.setattr("setpred.data.datamodule.subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(InputError, match=r"rendering .* failed"):
        RenderedScenes(**SCENES, folder=str(tmp_path / "other")).prepare_data()


def test_streamed_batches_are_those_of_a_file(streamed_folder):
    data = stream(streamed_folder)
    batch, stored = next(streamed(data)), next(iter(data.val_dataloader()))
    assert batch.keys() == stored.keys()
    for name in stored:
        for what in ("shape", "dtype", "stride"):
            one, other = getattr(batch[name], what), getattr(stored[name], what)
            assert (one() == other()) if callable(one) else (one == other), (name, what)
    assert same(data.on_after_batch_transfer(stored, 0), stored)


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_seed_and_step_decide_whatever_the_workers(streamed_folder, how):
    whole = list(streamed(stream(streamed_folder), epochs=2))
    data = stream(streamed_folder, num_workers=2)
    loader = data.train_dataloader()
    loader.multiprocessing_context = how
    data.train_dataloader = lambda: loader
    assert_same(streamed(data, epochs=2), whole)
    assert_same(streamed(stream(streamed_folder), first=1), whole[3:])
    one, other = (next(streamed(stream(streamed_folder, seed=seed, objects=(1, 2)))) for seed in (0, 1))
    assert not torch.equal(one["elements"], other["elements"])


def test_a_scene_does_not_depend_on_its_batch(streamed_folder):
    one, other = (
        {int(batch["index"][k]): {name: batch[name][k] for name in batch} for batch in batches for k in range(size)}
        for size in (1, 7)
        for batches in [list(streamed(stream(streamed_folder, batch_size=size, objects=(0, 4))))]
    )
    assert one.keys() == other.keys() == set(range(14))
    assert all(same(one[number], other[number]) for number in range(14))


def test_elements_are_what_the_picture_shows(streamed_folder):
    data = stream(streamed_folder, objects=(1, 3))
    batch = data.train_data.__getitems__([5, 2])
    assert batch["index"].tolist() == [5, 2]
    for k, present in enumerate(batch["scenes"].present):
        objects = CLEVR.decode(batch["elements"][k])
        assert len(objects) == int(present.sum()) == int(batch["mask"][k].sum())
        centres = torch.tensor([obj["coords"] for obj in objects])
        assert torch.allclose(centres, batch["scenes"].centre[k, present], atol=1e-6)
    image = data.on_after_batch_transfer(batch)["image"]
    assert torch.equal(image.permute(0, 2, 3, 1), render(batch["scenes"], width=16, height=16))


def test_no_scene_comes_twice(streamed_folder, tmp_path):
    """Neither in a stream nor in a file of validation or training scenes of the same seed."""
    assert STREAM != 0  # NumPy takes [seed, number] and [seed, number, 0] for the same seed
    batches = torch.cat([batch["elements"] for batch in streamed(stream(streamed_folder, objects=(2, 2)), epochs=2)])
    assert len(batches.flatten(1).unique(dim=0)) == len(batches) == 24
    for seed in (0, 1_000_000):
        path = tmp_path / f"{seed}.h5"
        render_file(path, images=10, image_size=16, objects=(2, 2), seed=seed)
        stored = SetFile(path).__getitems__(range(10))["elements"]
        assert not (batches[:, None] == stored).all(-1).all(-1).any()


def test_a_condition_ties_colours_to_shapes(streamed_folder):
    for batch in streamed(stream(streamed_folder, condition="cogent-a", objects=(3, 3)), epochs=2):
        for elements in batch["elements"]:
            assert all(obj["color"] in COGENT_A[obj["shape"]] for obj in CLEVR.decode(elements))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
        ({"scenes_seed": -1}, "expected scenes_seed of at least 0, got -1"),
        ({"objects": (3, 11)}, "expected 0 <= least <= most <= 10"),
        ({"set_size": 1}, "expected scenes of at most 1 objects for sets of 1, got objects up to 2"),
        ({"image_size": 4}, "at least 8x8"),
        ({"val_images": 0}, "at least 1 image"),
        ({"condition": "cogent-c"}, "expected a condition out of clevr, cogent-a, cogent-b, got 'cogent-c'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        StreamedScenes(**STREAMED | options)
    if "set_size" not in options:
        with pytest.raises(InputError, match=message):
            RenderedScenes(**SCENES | options)


TRAINING = (
    CONFIG[: CONFIG.index("data:")]
    + """data:
  class_path: setpred.data.streamed.StreamedScenes
  init_args:
    {scenes_per_epoch: 40, val_images: 12, image_size: 16, objects: [3, 4], set_size: 4, batch_size: 8, workers: 1}
trainer: {max_epochs: 2, accelerator: cpu, precision: 32-true}
"""
)


def test_a_training_on_streamed_scenes(tmp_path):
    """Trains, validates, and is evaluated on the same file."""
    prepare(StreamedScenes(image_size=16, objects=(3, 4), val_images=12, folder=str(tmp_path)))
    (tmp_path / "streamed.yaml").write_text(TRAINING)
    options = ["--config", str(tmp_path / "streamed.yaml"), "--runs", str(tmp_path)]
    whole = train([*options, f"--data.init_args.folder={tmp_path}"])
    with (whole / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["5", "10"]
    assert all(0 <= float(row["val_ap_inf"]) <= 1 and float(row["train_loss"]) > 0 for row in table)
    result = evaluate([str(whole / "last.ckpt")])
    assert result["images"] == len(SetFile(result["data"])) == 12
    for name, score in result["ap"].items():
        assert score == pytest.approx(float(table[-1][f"val_ap_{name}"]), abs=1e-6)

    for options, seed in (([], 0), (["--seed_everything=3"], 3), (["--data.init_args.seed=5"], 5)):
        assert build(["--config", str(tmp_path / "streamed.yaml"), *options]).datamodule.seed == seed
