"""Laws of augmentation: objects move with their image, nothing else changes, and the seed decides everything."""

import numpy as np
import pytest
import torch
from tiny import CONFIG, equal, metrics, set_file

from setpred.commands.train import build, train
from setpred.data.augmentation import Augmentation
from setpred.data.datamodule import RenderedScenes
from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema, categorical, continuous, periodic

SIDE, SIZE = 64.0, 32
FIELDS = [
    continuous("coords", 2, scale=SIDE / 2, offset=SIDE / 2),
    continuous("extent", 2, scale=SIDE / 2),
    continuous("joints", 4, scale=SIDE / 2, offset=SIDE / 2),
    continuous("radius", 1, scale=2.0, offset=4.0),
    continuous("angle", 1, scale=90.0, offset=90.0),
    continuous("depth", 1, scale=3.0),
    categorical("label", "a", "b"),
]
SCHEMA = ElementSchema("marks", FIELDS, max_objects=3)
KNOWN = {"angles": {"angle": 180.0}, "unchanged": ["depth"]}
KINDS = {
    "flip": {"flip": True},
    "turns": {"turns": True},
    "crop": {"zoom": (1.3, 2.5)},
    "shrink": {"zoom": (0.5, 0.8)},
    "all": {"flip": True, "turns": True, "zoom": (0.6, 2.0)},
}


def batch_of(count, schema=SCHEMA, seed=0):
    """Images with one bright pixel each, and one object at its centre; the other numbers are random."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    elements = np.zeros((count, schema.max_objects, schema.set_dim), np.float32)
    for image, element in zip(images, elements, strict=True):
        row, column = rng.integers(0, SIZE, 2)
        image[row, column] = 255
        x, y = (np.array([column, row]) + 0.5) * SIDE / SIZE
        values = {"coords": (x, y), "extent": (4.0, 2.0), "joints": (x, y, x, y), "radius": 3.0, "angle": 20.0}
        element[0] = schema.encode([values | {"depth": 1.0, "label": "a"}], 1)[0]
    elements = torch.from_numpy(elements)
    image = torch.from_numpy(images).permute(0, 3, 1, 2)
    return {"image": image, "elements": elements, "mask": elements[..., -1] > 0.5, "index": torch.arange(count)}


def values(batch, name):
    return SCHEMA.values(batch["elements"], name)[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_object_stays_at_its_pixel(kind):
    batch = batch_of(60)
    found = Augmentation(**KINDS[kind], **KNOWN).apply(batch, SCHEMA, seed=0, epoch=0)
    assert found["image"].shape == batch["image"].shape
    there = found["mask"][:, 0]
    light = found["image"].double().sum(1)
    assert torch.equal(there, light.flatten(1).sum(1) > 0) or "zoom" in KINDS[kind]
    assert there.float().mean() > 0.1
    line = (torch.arange(SIZE) + 0.5) * SIDE / SIZE
    for image, x, y in zip(light[there], *values(found, "coords")[there].T, strict=True):
        centre = [float((image.sum(axis) * line).sum() / image.sum()) for axis in (0, 1)]
        # a pixel at the edge of a crop is cut, which moves its centre by up to half of its size
        assert np.abs(np.array(centre) - [x, y]).max() < (1.6 * SIDE / SIZE if "zoom" in KINDS[kind] else 1e-4)
    joints = values(found, "joints").view(-1, 2, 2)
    assert torch.allclose(joints[there], values(found, "coords")[there].unsqueeze(1).expand(-1, 2, -1), atol=1e-4)
    for name in ("depth", "label"):
        assert torch.equal(values(found, name)[there], values(batch, name)[there])
    assert len({tuple(each.flatten().tolist()) for each in found["image"]}) > 20  # examples are changed apart


@pytest.mark.parametrize(("left", "quarters", "times"), [(0, 0, 1), (1, 0, 2), (0, 1, 4), (1, 2, 2), (0, 3, 4)])
def test_symmetries_are_exact(left, quarters, times, monkeypatch):
    """Known answers for all fields; a flip twice, or four quarter turns, leads back to the same bits."""
    batch = batch_of(4)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Chosen(left, quarters))
    changes = Augmentation(flip=True, turns=True, **KNOWN)
    x, y = values(batch, "coords").T
    x = SIDE - x if left else x
    for _ in range(quarters):  # anticlockwise
        x, y = y, SIDE - x
    angle = 180 - 20 if left else 20
    found = changes.apply(batch, SCHEMA, seed=0, epoch=0)
    assert torch.allclose(values(found, "coords"), torch.stack([x, y], dim=1), atol=1e-4)
    wanted = [2.0, 4.0] if quarters % 2 else [4.0, 2.0]
    assert torch.allclose(values(found, "extent"), torch.tensor(wanted), atol=1e-5)
    assert torch.allclose(values(found, "radius"), torch.tensor(3.0), atol=1e-5)
    assert torch.allclose(values(found, "angle"), torch.tensor((angle - 90.0 * quarters) % 180), atol=1e-4)
    for _ in range(times - 1):
        found = changes.apply(found, SCHEMA, seed=0, epoch=0)
    assert torch.equal(found["image"], batch["image"])
    assert torch.allclose(found["elements"], batch["elements"], atol=1e-5)
    places = SCHEMA.slice("coords")
    assert torch.equal(found["elements"][..., places], batch["elements"][..., places])


class Chosen:
    """A generator that flips and turns as asked."""

    def __init__(self, left, quarters):
        self.left, self.quarters = left, quarters

    def random(self):
        return 0.0 if self.left else 1.0

    def integers(self, *_):
        return self.quarters

    def uniform(self, *_):
        return np.zeros(3)


def test_zoom_scales_lengths_drops_objects_and_cuts_boxes():
    """Twice the size, of the upper left quarter."""
    boxes = ElementSchema("boxes", [*FIELDS[:2], FIELDS[3]], max_objects=3)
    objects = [{"coords": at, "extent": (8, 8), "radius": 3.0} for at in ((40, 10), (30, 10), (10, 20))]
    elements = torch.from_numpy(boxes.encode(objects)).unsqueeze(0)
    maps = torch.tensor([[[2.0, 0, 1], [0, 2, 1]]])
    moved, mask = Augmentation(zoom=(2.0, 2.0)).moved(elements, boxes, maps, torch.tensor([True]))
    assert mask.tolist() == [[True, True, False]]
    assert not moved[0, 2].any()
    found = boxes.values(moved[0], "coords").tolist(), boxes.values(moved[0], "extent").tolist()
    assert np.allclose(found[0][:2], [[58, 20], [20, 40]], atol=1e-4)  # the first reaches from 52 to the edge at 64
    assert np.allclose(found[1][:2], [[12, 16], [16, 16]], atol=1e-4)
    assert np.allclose(boxes.values(moved[0], "radius")[:2], 6, atol=1e-4)


def test_keypoints_and_periods_follow():
    """A keypoint that is absent, or leaves the crop, is absent; an angle with a period turns as a plain one."""
    fields = [FIELDS[0], continuous("tip", 2, optional=True, scale=SIDE / 2, offset=SIDE / 2), periodic("angle", 180)]
    schema = ElementSchema("tips", fields, max_objects=3)
    objects = [{"coords": (10, 20), "tip": tip, "angle": 20} for tip in ((12, 24), None, (40, 24))]
    elements = torch.from_numpy(schema.encode(objects)).unsqueeze(0)
    changes = Augmentation(turns=True, zoom=(2.0, 2.0), angles={"angle": 180.0})
    changes.check(schema)
    maps = torch.tensor([[[0.0, 2, 1], [-2, 0, -1]]])  # the upper left quarter, turned
    moved, mask = changes.moved(elements, schema, maps, torch.tensor([True]))
    found = schema.decode(moved[0])
    assert mask.all()
    assert [each["tip"] and np.round(each["tip"], 3).tolist() for each in found] == [[48, 40], None, None]
    assert all(each["angle"] == pytest.approx([110], abs=1e-3) for each in found)
    assert not moved[0, 1:, schema.slice("tip")].any()


def test_colours_and_noise_leave_objects_alone():
    batch = batch_of(8)
    batch["image"] = torch.full_like(batch["image"], 100)
    for changes in ({"colour": 0.3}, {"noise": 0.1}, {"hue": 0.2}):
        found = Augmentation(**changes).apply(batch, SCHEMA, seed=0, epoch=0)
        assert torch.equal(found["elements"], batch["elements"])
        assert found["image"].dtype == torch.uint8
        assert torch.equal(found["image"], batch["image"]) == ("hue" in changes)  # grey has no hue
        assert len({each.float().std().item() for each in found["image"]}) == (8 if "noise" in changes else 1)


def test_an_example_depends_on_seed_epoch_and_number_alone():
    batch, changes = batch_of(6), Augmentation(**KINDS["all"], colour=0.2, noise=0.1, **KNOWN)
    one = changes.apply(batch, SCHEMA, seed=1, epoch=2)
    order = torch.tensor([4, 1])
    other = changes.apply({name: value[order] for name, value in batch.items()}, SCHEMA, seed=1, epoch=2)
    assert equal({name: value[order] for name, value in one.items()}, other)
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(changes.apply(batch, SCHEMA, seed=seed, epoch=epoch)["image"], one["image"])


@pytest.mark.parametrize(
    ("schema", "options", "words"),
    [
        (CLEVR, {"flip": True}, "positions in pixels"),
        (CLEVR, {"zoom": (1.0, 2.0)}, "positions in pixels"),
        (CLEVR, {"hue": 0.1}, "has a field 'color'"),
        (SCHEMA, {"turns": True, "unchanged": ["depth"]}, r"how angle changes .*unchanged=\[angle\]"),
        (SCHEMA, {"flip": True, "lengths": ["widht"]}, "got widht"),
    ],
)
def test_what_cannot_be_augmented_is_an_error(schema, options, words):
    with pytest.raises(InputError, match=words):
        Augmentation(**options).check(schema)
    if schema is CLEVR:
        with pytest.raises(InputError, match=words):  # before anything is rendered
            RenderedScenes(augment=Augmentation(**options))


def test_what_can_be_augmented_is_no_error():
    for schema, options in ((CLEVR, {"noise": 0.1}), (CLEVR, {"colour": 0.1, "insist": True}), (SCHEMA, KNOWN)):
        Augmentation(**options).check(schema)
    for options in ({"zoom": (2.0, 1.0)}, {"zoom": (0.0, 1.0)}, {"colour": 1.5}, {"hue": 0.6}, {"noise": -1.0}):
        with pytest.raises(InputError, match="augment: expected"):
            Augmentation(**options)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A prepared file of 24 images with two points each."""
    schema = ElementSchema("cells", [FIELDS[0], FIELDS[-1]], max_objects=2)
    return set_file(tmp_path_factory.mktemp("cells") / "cells.h5", schema)


def test_training_alone_is_augmented_and_resumes_exactly(cells, tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.partition("data:")[0].replace("set_size: 4", "set_size: 2") + "trainer: {max_epochs: 2}\n")
    options = ["--config", str(config), "--data", str(cells), "--val", str(cells), "--batch_size", "8"]
    options += [
        "--trainer.accelerator",
        "cpu",
        "--runs",
        str(tmp_path),
        "--data.augment={flip: true, zoom: [0.8, 1.2]}",
    ]
    seen = []
    apply = Augmentation.apply
    monkeypatch.setattr(Augmentation, "apply", lambda *a, **k: seen.append(k["epoch"]) or apply(*a, **k))
    whole = train([*options, "--name", "whole"])
    assert seen == [0, 0, 0, 1, 1, 1]
    train([*options, "--name", "halves", "--epochs", "1"])
    halves = train([*options, "--name", "halves", "--resume", "last"])
    assert metrics(whole) == metrics(halves)
    plain = train([*options[:-1], "--name", "plain", "--epochs", "1"])
    assert metrics(plain)[0] != metrics(whole)[0]
    cli = build(options)
    cli.datamodule.setup("fit")
    batches = (cli.datamodule.train_dataloader(), cli.datamodule.val_dataloader(), cli.datamodule.statistics_batches(8))
    assert ["augment" in next(iter(some)) for some in batches] == [True, False, False]
