"""Data modules: what order, which examples, and the same after a resume."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from setpred import InputError
from setpred.data.datamodule import RenderedFile, RenderedScenes, SetDataModule
from setpred.data.dataset import SetFile
from setpred.data.loading import EpochPermutation
from setpred.data.scenes import render_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, images in (("train", 22), ("val", 11)):
        render_file(folder / f"{name}.h5", images=images, image_size=16, objects=(0, 3), seed=images)
    return str(folder / "train.h5"), str(folder / "val.h5")


def module(files, **options) -> SetDataModule:
    return SetDataModule(*files, **{"image_size": 16, "batch_size": 5} | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_full_and_validation_is_in_order(files, workers):
    data = module(files, num_workers=workers, eval_batch_size=4)
    data.setup("fit")
    batches = [batch["index"] for batch in data.train_dataloader()]
    assert [len(batch) for batch in batches] == [5] * 4
    assert len(torch.cat(batches).unique()) == 20
    assert torch.cat(batches).tolist() == list(EpochPermutation(22, seed=0))[:20]
    seen = [batch["index"].tolist() for batch in data.val_dataloader()]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.filterwarnings("ignore:/dev/shm has")
@pytest.mark.parametrize(("free", "workers"), [(0, 0), (2**40, 2)])
def test_loaders_have_the_workers_that_shared_memory_has_room_for(files, free, workers, monkeypatch):
    data = module(files, num_workers=2)
    data.setup("fit")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == workers


class Watch(LightningModule):
    """Learns nothing and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[list[int]] = []

    def training_step(self, batch, _):
        self.shown.append([self.current_epoch, *batch["index"].tolist()])
        return self.weight.square().sum() + batch["image"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    files, epochs: int, *, checkpoint: str | None = None, every: int | None = None, folder=None, **options
) -> tuple[list[list[int]], Trainer]:
    """Trains, with a checkpoint `every` so many steps into `folder`; what was shown."""
    model = Watch()
    kept = {"filename": "{step}", "auto_insert_metric_name": False, "save_top_k": -1, "every_n_train_steps": every}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=every is not None,
        callbacks=[] if every is None else [ModelCheckpoint(folder, **kept)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=module(files, **options), ckpt_path=checkpoint)
    return model.shown, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(files, tmp_path, workers):
    whole, trainer = fit(files, 3, num_workers=workers, every=1, folder=tmp_path)
    assert len(whole) == 12
    assert len({tuple(shown[1:]) for shown in whole}) == 12  # another order each epoch
    for step in range(1, 12):
        rest, _ = fit(files, 3, num_workers=workers, checkpoint=str(tmp_path / f"{step}.ckpt"))
        assert whole[:step] + rest == whole
    first, trainer = fit(files, 1, num_workers=workers)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    rest, _ = fit(files, 3, num_workers=workers, checkpoint=str(tmp_path / "end.ckpt"))
    assert first + rest == whole
    assert fit(files, 1, seed=1)[0] != first


def test_only_what_is_asked_for(files):
    data = module((None, files[1]), val_images=3)
    data.setup("validate")
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2]]
    with pytest.raises(InputError, match="no training part"):
        data.setup("fit")


def test_fewer_images_than_a_batch(files):
    with pytest.raises(InputError, match="22 training images, fewer than one batch of 23"):
        module(files, batch_size=23).setup("fit")
    with pytest.raises(InputError, match="3 training images, fewer than one batch of 5"):
        module(files, train_images=3).setup("fit")


SCENES = {"train_images": 6, "val_images": 4, "image_size": 16, "objects": (0, 2), "batch_size": 3, "workers": 0}


def test_built_in_scenes_are_rendered_once(tmp_path, monkeypatch):
    data = RenderedScenes(**SCENES, folder=str(tmp_path / "data"))
    data.prepare_data()
    names = ["rendered-16-0to2-seed0-6.h5", "rendered-16-0to2-seed1000000-4.h5"]
    assert sorted(os.listdir(tmp_path / "data")) == names
    train, val = (SetFile(tmp_path / "data" / name) for name in names)
    assert not any(torch.equal(a["image"], b["image"]) for a in train for b in val)

    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("rendered again"))
    again = RenderedScenes(**SCENES | {"batch_size": 2, "seed": 5}, folder=str(tmp_path / "data"))
    again.prepare_data()
    again.setup("fit")
    assert [len(again.train_data), len(again.val_data)] == [6, 4]


def test_jobs_that_begin_together_render_once(tmp_path, monkeypatch):
    rendered, render = [], RenderedFile._render

    def slow(file):
        rendered.append(file.path)
        time.sleep(0.5)  # longer than the first look at the lock
        render(file)

    monkeypatch.setattr(RenderedFile, "_render", slow)
    file = RenderedFile(str(tmp_path / "deep"), 4, 16, (3, 4), 5, workers=1)
    jobs = [threading.Thread(target=file.prepare) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert rendered == [file.path]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [Path(file.path).name]


def test_a_wrong_file_under_the_name_is_not_used(tmp_path, monkeypatch):
    data = RenderedScenes(**SCENES, folder=str(tmp_path))
    data.prepare_data()
    content = (tmp_path / "rendered-16-0to2-seed0-6.h5").read_bytes()

    (tmp_path / "rendered-16-0to2-seed0-6.h5").write_bytes(content[:9000])
    with pytest.raises(InputError, match="cut short"):
        data.prepare_data()

    render_file(tmp_path / "rendered-16-0to2-seed0-6.h5", images=6, image_size=16, objects=(0, 2), seed=4, force=True)
    with pytest.raises(InputError, match="is not what its name says"):
        data.prepare_data()

    (tmp_path / "rendered-16-0to2-seed0-6.h5").write_bytes(content)
    monkeypatch.setattr(
        "setpred.data.scenes.render", lambda scenes, *, width, height: 9 + 0 * render(scenes, width, height)
    )
    with pytest.raises(InputError, match="another version of the renderer"):
        data.prepare_data()


def render(scenes, width, height):
    from setpred.rendering.renderer import render

    return render(scenes, width=width, height=height)


def test_a_rendering_that_fails_is_reported(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(InputError, match="a file, not a folder"):
        RenderedScenes(**SCENES, folder=str(tmp_path / "data")).prepare_data()
    monkeypatch.setattr("setpred.data.datamodule.subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(InputError, match=r"rendering .* failed"):
        RenderedScenes(**SCENES, folder=str(tmp_path / "other")).prepare_data()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SetDataModule, {"train": None, "val": "b.h5", "image_size": 32, "set_size": 6}),
        (RenderedScenes, {"objects": [3, 6], "image_size": 32, "seed": 4}),
    ],
)
def test_a_configuration_builds_them(cls, options):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(cls, "data")
    config = parser.parse_string(
        yaml.safe_dump({"data": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options}})
    )
    built = parser.instantiate(config).data
    assert isinstance(built, cls)
    assert built.image_size == 32
    assert built.seed == options.get("seed")  # None: the seed of the run
