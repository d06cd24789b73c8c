"""The whole set in the memory of the device: the same batches, whatever the epoch, the rank and where one goes on."""

from types import SimpleNamespace

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from setpred import InputError
from setpred.data import dataset
from setpred.data.datamodule import RenderedScenes, SetDataModule
from setpred.data.dataset import SetFile
from setpred.data.scenes import render_file, render_folder
from setpred.data.streamed import StreamedScenes

CPU = torch.device("cpu")
DEVICES = [CPU, *[torch.device("cuda", 0)] * torch.cuda.is_available()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, images in (("train", 31), ("val", 7)):
        render_file(folder / f"{name}.h5", images=images, image_size=8, objects=(0, 3), seed=images)
    return str(folder / "train.h5"), str(folder / "val.h5")


def module(files, in_memory, *, device=CPU, ranks=1, rank=0, **options) -> SetDataModule:
    data = SetDataModule(*files, image_size=8, batch_size=4, in_memory=in_memory, seed=5, **options)
    strategy = SimpleNamespace(root_device=device)
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, strategy=strategy)
    data.setup("fit")
    return data


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name in mine:
            assert mine[name].dtype == its[name].dtype
            assert mine[name].stride() == its[name].stride()
            assert torch.equal(mine[name].cpu(), its[name])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("ordinary", [False, True, None])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_batches_are_those_of_the_ordinary_way(files, device, ordinary, rank):
    """Over two epochs, for each of two ranks, and going on within an epoch."""
    among = {} if rank is None else {"ranks": 2, "rank": rank}
    mine, its = module(files, "device", device=device, **among), module(files, ordinary, **among)
    ours, theirs = mine.train_dataloader(), its.train_dataloader()
    for epoch in range(2):
        ours.sampler.set_epoch(epoch)
        theirs.sampler.set_epoch(epoch)
        assert len(ours) == len(theirs)
        assert_same(ours, theirs)
    state = ours.state_dict() | {"epoch": 1, "batches": 1}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    assert_same(ours, theirs)
    assert_same(mine.val_dataloader(), its.val_dataloader())


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_images_are_on_the_device_as_uint8_and_not_moved_again(files, device):
    data = module(files, "device", device=device, num_workers=2 if device.type == "cuda" else 0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        moved = data.transfer_batch_to_device(batch, device, 0)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].device == device
        assert moved["image"].data_ptr() == batch["image"].data_ptr()
        assert all(value.device == device for value in moved.values())
        assert not loader.pin_memory


def test_a_batch_is_a_copy(files):
    """What is done to a batch is not done to the set."""
    loader = module(files, "device").val_dataloader()
    next(iter(loader))["image"].zero_()
    assert next(iter(loader))["image"].any()


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


def test_a_training_sees_the_same_also_after_a_resume(files, tmp_path):
    def fit(in_memory, *, checkpoint=None):
        watch = Watch()
        every = ModelCheckpoint(
            tmp_path, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"enable_checkpointing": checkpoint is None, "callbacks": [] if checkpoint else [every]}
        trainer = Trainer(max_epochs=2, accelerator="cpu", **quiet)
        data = SetDataModule(*files, image_size=8, batch_size=4, in_memory=in_memory, seed=5)
        trainer.fit(watch, datamodule=data, ckpt_path=checkpoint)
        return watch.shown

    whole = fit(False)
    assert len(whole) == 14
    for step in (3, 7, 9):  # the second is the end of an epoch
        assert whole[:step] + fit("device", checkpoint=str(tmp_path / f"{step}.ckpt")) == whole
    assert fit("device") == whole


def test_a_set_that_does_not_fit_is_refused(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (31 * 8 * 8 * 3 - 1, 10**9))
    data = SetFile(files[0])
    with pytest.raises(InputError, match=r"31 images of .* take 0.0 GB, but cuda:0 has 0.0 GB free; .*in_memory: true"):
        data.load(torch.device("cuda", 0))
    assert data[0]["image"].device == CPU


@pytest.mark.parametrize("device", [None, CPU], ids=str)
def test_a_set_that_failed_to_load_has_no_images(files, monkeypatch, device):
    data = SetFile(files[0], in_memory=True)
    with monkeypatch.context() as damage:
        damage.setattr(dataset, "read_images", lambda file, index: (_ for _ in ()).throw(OSError("checksum")))
        with pytest.raises(InputError, match="is damaged"):
            data.load(device)
        with pytest.raises(InputError, match="is damaged"):
            data[0]
    torch.testing.assert_close(data[0]["image"], SetFile(files[0], in_memory=False)[0]["image"])


def test_a_folder_is_refused(tmp_path):
    render_folder(tmp_path, split="val", images=1, objects=(3, 3), seed=0, width=48, height=32, workers=0)
    data = SetDataModule(None, str(tmp_path), image_size=8, in_memory="device")
    with pytest.raises(InputError, match=r"is a folder; make a file of it with python -m setpred data prepare"):
        data.setup("validate")


@pytest.mark.parametrize("value", ["device", True, False, None])
@pytest.mark.parametrize("cls", [SetDataModule, RenderedScenes, StreamedScenes])
def test_a_configuration_says_where(cls, value):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(cls, "data")
    options = {"in_memory": value} | ({"train": None, "val": "b.h5"} if cls is SetDataModule else {})
    text = yaml.safe_dump({"data": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options}})
    built = parser.instantiate(parser.parse_string(text)).data
    assert built.in_memory is value or built.in_memory == value == "device"
