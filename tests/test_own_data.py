"""The data sets of docs/results.md's proofs: what is annotated is what is drawn, and no split knows another."""

import csv
import importlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.own_data import digits, trees
from benchmarks.own_data.splits import TABLE, images_of, scores
from setpred.commands import data
from setpred.data.toy.digits import bundled_digits

ROOT = Path(__file__).resolve().parents[1]
SCENES = {"train": 30, "val": 4, "test": 5}


def rows_of(folder):
    """The rows of a split's table by image, those without a row included."""
    found = {path.name: [] for path in sorted(folder.glob("*.png"))}
    with (folder / TABLE).open(newline="") as file:
        for row in csv.DictReader(file):
            found[row.pop("image")].append(row)
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    digits.make(folder, SCENES)
    return folder


def test_scenes_of_digits_are_as_described(scenes, tmp_path):
    digits.make(tmp_path, SCENES)
    for split, count in SCENES.items():
        found = rows_of(scenes / split)
        assert len(found) == count
        for name, rows in found.items():
            assert (tmp_path / split / name).read_bytes() == (scenes / split / name).read_bytes()
            assert digits.COUNTS[0] <= len(rows) <= digits.COUNTS[1]
            for row in rows:
                centre, half = np.array([float(row["x"]), float(row["y"])]), float(row["size"]) / 2
                assert (centre - half >= 0).all()
                assert (centre + half <= digits.SIDE).all()
                assert row["digit"] in "0123456789"


def test_no_digit_is_in_two_splits():
    pytest.importorskip("sklearn")
    inks = digits.inks()
    assert sum(len(ink.images) for ink in inks.values()) == sum(len(bundled_digits(s).images) for s in ("train", "val"))
    kinds = [{image.tobytes() for image in ink.images} for ink in inks.values()]
    assert len(set.union(*kinds)) == sum(map(len, kinds))


def test_the_baseline_of_digits_finds_digits(scenes):
    for split in SCENES:
        source = map(str, digits.source(scenes, split))
        assert data.main(["import", *source, "--out", str(scenes / f"{split}.h5")]) == 0
    (found,) = digits.baselines(scenes).values()
    assert scores(scenes, "test", found["test"])["ap"]["inf"] > 0.1  # a guess has a tenth of the classes right


@pytest.mark.parametrize("name", ["CLUSTERS", "SPECTRA"])
def test_the_baselines_of_simulated_data_find_what_was_simulated(name, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    simulated = importlib.import_module("benchmarks.own_data.simulated")
    monkeypatch.setattr(simulated, "SPLITS", {"train": 20, "val": 5, "test": 20})
    proof = getattr(simulated, name)
    proof.make(tmp_path)
    for split in simulated.SPLITS:
        source = map(str, proof.source(tmp_path, split))
        assert data.main(["import", *source, "--out", str(tmp_path / f"{split}.h5")]) == 0
    (found,) = proof.baselines(tmp_path).values()
    assert 0.5 < scores(tmp_path, "test", found["test"])["ap"]["inf"] <= 1


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with one picture: trees are rectangles of different colours."""
    rng, boxes = np.random.default_rng(0), []
    picture = np.zeros((400, 300, 3), np.uint8)
    for row in range(7):
        for column in range(5):
            width, height = rng.integers(10, 40, 2)
            left, top = 57 * column + rng.integers(0, 17), 57 * row + rng.integers(0, 17)
            boxes.append((left, top, left + width, top + height))
            picture[top : top + height, left : left + width] = len(boxes)
    drawn = io.BytesIO()
    Image.fromarray(picture).save(drawn, "PNG")
    names = ("xmin", "ymin", "xmax", "ymax")
    inner = ("".join(f"<{n}>{v}</{n}>" for n, v in zip(names, box, strict=True)) for box in boxes)
    text = "".join(f"<object><name>Tree</name><bndbox>{box}</bndbox></object>" for box in inner)
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deepforest/data/p.png", drawn.getvalue())
        archive.writestr("deepforest/data/p.xml", f"<annotation>{text}</annotation>")
    monkeypatch.setattr(trees, "PARTS", {"p": {"train": (0, 200), "strips": (264, 400)}})
    return path


def test_boxes_of_tiles_follow_their_pixels(wheel, tmp_path):
    trees.make(tmp_path, wheel)
    assert len(rows_of(tmp_path / "train")) == 8 * 2 * 3
    assert len(rows_of(tmp_path / "strips")) == 2
    seen = {}
    for split in ("train", "strips"):
        tables = rows_of(tmp_path / split)
        for rows, image in zip(tables.values(), images_of(tmp_path, split), strict=True):
            assert image.shape == (trees.TILE, trees.TILE, 3)
            colours = set(np.unique(image)) - {0}
            seen.setdefault(split, set()).update(colours)
            for row in rows:
                left, top, right, bottom = (round(float(row[side])) for side in ("xmin", "ymin", "xmax", "ymax"))
                (colour,) = np.unique(image[top:bottom, left:right])  # the box holds its tree alone, all of it
                assert (image == colour).sum() == 3 * (right - left) * (bottom - top) > 0
                colours.discard(colour)
            assert all((image == colour).any(2).sum() < 0.5 * 40 * 40 for colour in colours)  # less than half visible
    assert not seen["train"] & seen["strips"]


def test_the_parts_of_the_pictures_share_no_tree():
    path = ROOT / trees.WHEEL
    if not path.is_file():
        pytest.skip(f"no {trees.WHEEL} in {ROOT}; pip download deepforest==2.1.0 --no-deps")
    with zipfile.ZipFile(path) as archive:
        counts = {}
        for name, parts in trees.PARTS.items():
            image, boxes = trees.annotated(archive, name)
            counts[name] = len(boxes)
            assert boxes.min() >= 0
            assert (boxes[:, 2:] <= image.shape[1::-1]).all()
            within = {split: (boxes[:, 3] > first) & (boxes[:, 1] < last) for split, (first, last) in parts.items()}
            for split, mine in within.items():
                if split in trees.TESTS:
                    assert not any((mine & theirs).any() for other, theirs in within.items() if other != split)
    assert sum(counts.values()) == 951
