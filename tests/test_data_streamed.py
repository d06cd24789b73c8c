"""Streamed scenes: none twice, the same ones whoever makes them, pictures as from a file, and a training on them."""

import csv
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import CONFIG

from setpred import CLEVR, InputError
from setpred.commands.evaluate import evaluate
from setpred.commands.train import build, train
from setpred.data.dataset import SetFile
from setpred.data.scenes import render_file
from setpred.data.streamed import STREAM, StreamedScenes
from setpred.rendering.renderer import render
from setpred.rendering.sampling import COGENT_A

SMALL = {"scenes_per_epoch": 14, "val_images": 4, "image_size": 16, "objects": (0, 2), "batch_size": 4, "workers": 0}
FIELDS = ("coords", "material", "color", "shape", "size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the validation scenes lie."""
    folder = str(tmp_path_factory.mktemp("streamed"))
    prepare(StreamedScenes(**SMALL, folder=folder))
    return folder


def prepare(data: StreamedScenes) -> None:
    """`prepare_data`, but rendering in this process: starting another one takes longer than the rest."""
    which = {"objects": data.rules.objects, "seed": data.files[0].seed, "condition": data.condition}
    render_file(data.val_path, images=data.files[0].images, image_size=data.image_size, **which)
    data.prepare_data()


def module(folder, **options) -> StreamedScenes:
    data = StreamedScenes(**SMALL | options)
    data.val_path = StreamedScenes(**SMALL, folder=folder).val_path  # one file for all: it is not what is tested
    data.setup("fit")
    return data


def shown(data: StreamedScenes, epochs=1, first=0):
    """The batches of these epochs, as a training step gets them."""
    loader = data.train_dataloader()
    for epoch in range(first, first + epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield data.on_after_batch_transfer(batch, 0)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_batches_are_those_of_a_file(folder):
    data = module(folder)
    batch = next(shown(data))
    stored = next(iter(data.val_dataloader()))
    assert batch.keys() == stored.keys()
    for name in stored:
        assert batch[name].shape == stored[name].shape, name
        assert batch[name].dtype == stored[name].dtype, name
        assert batch[name].stride() == stored[name].stride(), name
    assert equal(data.on_after_batch_transfer(stored, 0), stored)


def test_no_scene_comes_twice(folder):
    batches = list(shown(module(folder, objects=(1, 2)), epochs=3))
    numbers = torch.cat([batch["index"] for batch in batches]).tolist()
    assert numbers == [*range(12), *range(14, 26), *range(28, 40)]  # a last batch of 2 is left out
    assert len({tuple(elements.flatten().tolist()) for batch in batches for elements in batch["elements"]}) == 36


def test_seed_and_step_decide(folder):
    whole = list(shown(module(folder), epochs=2))
    again = list(shown(module(folder, num_workers=2), epochs=2))
    assert all(equal(*pair) for pair in zip(whole, again, strict=True))
    later = list(shown(module(folder), first=1))
    assert all(equal(*pair) for pair in zip(whole[3:], later, strict=True))
    other = next(shown(module(folder, seed=1, objects=(1, 2))))
    assert not torch.equal(other["elements"], next(shown(module(folder, objects=(1, 2))))["elements"])


def test_a_scene_does_not_depend_on_its_batch(folder):
    by_number = [
        {int(batch["index"][k]): {name: batch[name][k] for name in batch} for batch in batches for k in range(size)}
        for size in (1, 7)
        for batches in [list(shown(module(folder, batch_size=size, objects=(0, 4))))]
    ]
    assert by_number[0].keys() == by_number[1].keys() == set(range(14))
    assert all(equal(by_number[0][number], by_number[1][number]) for number in range(14))


def test_elements_are_what_the_picture_shows(folder):
    data = module(folder, objects=(1, 3))
    batch = data.train_data.__getitems__([5, 2])
    assert batch["index"].tolist() == [5, 2]
    for k, present in enumerate(batch["scenes"].present):
        objects = CLEVR.decode(batch["elements"][k])
        assert len(objects) == int(present.sum()) == int(batch["mask"][k].sum())
        centres = torch.tensor([obj["coords"] for obj in objects])
        assert torch.allclose(centres, batch["scenes"].centre[k, present], atol=1e-6)
    image = data.on_after_batch_transfer(batch)["image"]
    assert torch.equal(image.permute(0, 2, 3, 1), render(batch["scenes"], width=16, height=16))


def test_processes_share_the_stream(folder):
    def numbers(processes, process):
        data = module(folder, scenes_per_epoch=26)
        loader = data.train_dataloader()
        loader.sampler.deal(processes, process)
        loader.sampler.set_epoch(1)
        return [batch["index"].tolist() for batch in loader]

    dealt = [numbers(3, process) for process in range(3)]
    steps = [sorted(chain(*step)) for step in zip(*dealt, strict=True)]
    assert steps == [list(range(26, 38)), list(range(38, 50))]


def test_files_and_streams_do_not_coincide(folder, tmp_path):
    """Neither the file of validation scenes nor one of training scenes of the same seed."""
    assert STREAM != 0  # NumPy takes [seed, number] and [seed, number, 0] for the same seed
    data = module(folder, objects=(2, 2))
    streamed = torch.cat([batch["elements"] for batch in shown(data, epochs=2)])
    for seed in (0, 1_000_000):
        path = tmp_path / f"{seed}.h5"
        render_file(path, images=10, image_size=16, objects=(2, 2), seed=seed)
        stored = SetFile(path).__getitems__(range(10))["elements"]
        assert not (streamed[:, None] == stored).all(-1).all(-1).any()


def test_a_condition_ties_colours_to_shapes_in_both_parts(tmp_path):
    data = StreamedScenes(**SMALL | {"condition": "cogent-a", "objects": (3, 3)}, folder=str(tmp_path))
    prepare(data)
    data.setup("fit")
    for batch in (*shown(data, epochs=2), *data.val_dataloader()):
        for elements in batch["elements"]:
            assert all(obj["color"] in COGENT_A[obj["shape"]] for obj in CLEVR.decode(elements))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenes_per_epoch": 3}, "scenes_per_epoch 3 is less than one batch of 4"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"num_workers": -1}, "expected num_workers of at least 0, got -1"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
        ({"scenes_seed": -1}, "expected scenes_seed of at least 0, got -1"),
        ({"objects": (3, 2)}, "expected 0 <= least <= most"),
        ({"objects": (3, 11)}, "expected 0 <= least <= most <= 10"),
        ({"set_size": 1}, "a set_size of 1 does not hold scenes of up to 2 objects"),
        ({"image_size": 4}, "at least 8x8"),
        ({"val_images": 0}, "at least 1 image"),
        ({"condition": "cogent-c"}, "expected a condition out of clevr, cogent-a, cogent-b, got 'cogent-c'"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        StreamedScenes(**SMALL | options)


class Watch(LightningModule):
    """Learns nothing and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[list[int]] = []

    def training_step(self, batch, _):
        self.shown.append([*batch["index"].tolist(), int(batch["image"].sum())])
        return self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs, *, checkpoint=None, save_to=None, **options):
    model = Watch()
    name = {"filename": "{step}", "auto_insert_metric_name": False}
    keep = ModelCheckpoint(save_to, save_top_k=-1, every_n_train_steps=1, **name) if save_to else None
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=keep is not None,
        callbacks=[keep] if keep else [],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=StreamedScenes(**SMALL | options, folder=folder), ckpt_path=checkpoint)
    return model.shown


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_next_scenes(folder, tmp_path, workers):
    whole = fit(folder, 3, num_workers=workers, save_to=tmp_path)
    assert [number for *numbers, _ in whole for number in numbers] == [*range(12), *range(14, 26), *range(28, 40)]
    for step in (2, 3, 5, 7):  # the third and the sixth are the last of their epochs
        rest = fit(folder, 3, num_workers=workers, checkpoint=str(tmp_path / f"{step}.ckpt"))
        assert whole[:step] + rest == whole
    smaller = fit(folder, 1, num_workers=workers, checkpoint=str(tmp_path / "2.ckpt"), batch_size=2)
    assert [number for *numbers, _ in smaller for number in numbers] == list(range(8, 14))
    with pytest.raises(InputError, match="scenes_per_epoch was 14 before and is 8 now"):
        fit(folder, 3, scenes_per_epoch=8, checkpoint=str(tmp_path / "3.ckpt"))


STREAMED = (
    CONFIG[: CONFIG.index("data:")]
    + """data:
  class_path: setpred.data.streamed.StreamedScenes
  init_args:
    {scenes_per_epoch: 40, val_images: 12, image_size: 16, objects: [3, 4], set_size: 4, batch_size: 8, workers: 1}
trainer: {max_epochs: 2, accelerator: cpu, precision: 32-true}
"""
)


def run(folder, data, *arguments):
    folder.mkdir(exist_ok=True)
    (folder / "streamed.yaml").write_text(STREAMED)
    options = ["--config", str(folder / "streamed.yaml"), "--runs", str(folder), f"--data.init_args.folder={data}"]
    return train([*options, *arguments])


def test_a_training_on_streamed_scenes(tmp_path):
    """Trains, validates, is evaluated on the same file, and resumes bit by bit."""
    prepare(StreamedScenes(image_size=16, objects=(3, 4), val_images=12, folder=str(tmp_path)))
    whole = run(tmp_path / "a", tmp_path)
    with (whole / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["5", "10"]
    assert all(0 <= float(row["val_ap_inf"]) <= 1 and float(row["train_loss"]) > 0 for row in table)
    result = evaluate([str(whole / "last.ckpt")])
    assert result["images"] == len(SetFile(result["data"])) == 12
    for name, score in result["ap"].items():
        assert score == pytest.approx(float(table[-1][f"val_ap_{name}"]), abs=1e-6)

    run(tmp_path / "b", tmp_path, "--trainer.max_epochs=1")
    halves = run(tmp_path / "b", tmp_path, "--resume=last", "--data.init_args.num_workers=2")
    ours, theirs = (torch.load(path / "last.ckpt", weights_only=True)["state_dict"] for path in (whole, halves))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_seed_of_the_run_is_that_of_the_stream(tmp_path):
    (tmp_path / "streamed.yaml").write_text(STREAMED)
    for options, seed in (([], 0), (["--seed_everything=3"], 3), (["--data.init_args.seed=5"], 5)):
        assert build(["--config", str(tmp_path / "streamed.yaml"), *options]).datamodule.seed == seed
