"""Built-in scenes as a CLEVR folder: what it says, and that no interruption spoils it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setpred import InputError
from setpred.commands.data import main
from setpred.data import scenes as rendered_folder
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import open_data
from setpred.data.hdf5 import open_set_file, read_header
from setpred.data.scenes import built_in_scenes, render_file, render_folder
from setpred.files import publish
from setpred.rendering.records import read_cameras, scene_of
from setpred.rendering.renderer import render
from setpred.rendering.sampling import COGENT_A

SMALL = {"split": "val", "images": 5, "objects": (2, 4), "width": 24, "height": 16}


def content(root: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    render_folder(root, **SMALL)
    return root


def test_the_layout(whole):
    names = [f"images/val/CLEVR_val_{number:06d}.png" for number in range(5)]
    assert sorted(content(whole)) == ["cameras.jsonl", *names, "scenes/CLEVR_val_scenes.json"]
    document = json.loads((whole / "scenes" / "CLEVR_val_scenes.json").read_text())
    assert document["info"]["split"] == "val"
    assert document["info"]["source"] == {"kind": "rendered", "objects": [2, 4], "seed": 0}
    scenes = built_in_scenes(range(5), seed=0, objects=(2, 4))
    cameras = read_cameras(whole / "cameras.jsonl", split="val")
    pictures = render(scenes, width=24, height=16).numpy()
    for number, record in enumerate(document["scenes"]):
        assert scene_of(record, *cameras[number]) == scenes[number]
        with Image.open(whole / "images" / "val" / record["image_filename"]) as image:
            np.testing.assert_array_equal(np.asarray(image), pictures[number])


def test_it_is_read_as_clevr_is(tmp_path):
    assert main(["render-folder", "--images", "2", "--workers", "0", "--out", str(tmp_path / "folder")]) == 0
    render_file(tmp_path / "a.h5", images=2, image_size=32)
    folder = ClevrFolder(tmp_path / "folder", "val")
    with Image.open(folder.path(0)) as image:
        assert image.size == (480, 320)
    one, other = open_data(tmp_path / "folder", split="val", image_size=32), open_data(tmp_path / "a.h5", image_size=32)
    for number in range(2):
        np.testing.assert_allclose(folder.camera(number), other.camera(number), atol=0.02)
    ours, theirs = one.__getitems__([0, 1]), other.__getitems__([0, 1])
    np.testing.assert_array_equal(ours["elements"], theirs["elements"])
    prepare = ["prepare", str(tmp_path / "folder"), "--image-size", "32", "--workers", "0"]
    assert main([*prepare, "--out", str(tmp_path / "b.h5")]) == 0


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        main(["render-folder", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("CLEVR_v1.0 layout", "--split", "--width W", "cogent-a"))


def test_the_bytes_do_not_depend_on_the_workers(whole, tmp_path):
    render_folder(tmp_path, **SMALL, workers=2)
    assert content(tmp_path) == content(whole)


def test_other_seeds_give_other_scenes(whole, tmp_path):
    render_folder(tmp_path, **SMALL, seed=1)
    assert content(tmp_path).keys() == content(whole).keys()
    assert not set(content(tmp_path).values()) & set(content(whole).values())


class Stop(Exception):
    pass


def interrupt(monkeypatch, after):
    """The rendering ends in an error after so many pictures, each rendered by itself."""

    def limited(function, items, *, workers):
        for number, item in enumerate(items):
            if number == after:
                raise Stop
            yield function(item)

    monkeypatch.setattr(rendered_folder, "BLOCK_PIXELS", 1)
    monkeypatch.setattr(rendered_folder, "ordered_map", limited)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_folder_goes_on_and_ends_the_same(whole, tmp_path, monkeypatch, capsys, stop):
    with monkeypatch.context() as context:
        interrupt(context, stop)
        with pytest.raises(Stop):
            render_folder(tmp_path, **SMALL)
    finals = [tmp_path / "images" / "val", tmp_path / "scenes" / "CLEVR_val_scenes.json", tmp_path / "cameras.jsonl"]
    assert not any(path.exists() for path in finals)
    render_folder(tmp_path, **SMALL)
    assert (f"goes on after {stop} of 5" in capsys.readouterr().err) == (stop > 0)
    assert content(tmp_path) == content(whole)


def test_a_journal_that_was_cut_short(whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as context:
        interrupt(context, 3)
        with pytest.raises(Stop):
            render_folder(tmp_path, **SMALL)
    journal = tmp_path / "scenes" / "CLEVR_val_scenes.json.partial"
    journal.write_bytes(journal.read_bytes()[:-10])
    render_folder(tmp_path, **SMALL)
    assert "goes on after 2 of 5" in capsys.readouterr().err
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("change", ["settings", "pictures"])
def test_what_does_not_fit_is_started_again(whole, tmp_path, monkeypatch, capsys, change):
    with monkeypatch.context() as context:
        interrupt(context, 3)
        with pytest.raises(Stop):
            render_folder(tmp_path, **SMALL | ({"seed": 4} if change == "settings" else {}))
    if change == "pictures":
        (tmp_path / "images" / "val.partial" / "CLEVR_val_000001.png").unlink()
    render_folder(tmp_path, **SMALL)
    assert "starting again" in capsys.readouterr().err
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("moved", [False, True])
def test_interrupted_while_names_are_given(whole, tmp_path, monkeypatch, step, moved):
    steps = iter(range(10))

    def fail(partial, final):
        now = next(steps) == step
        if moved or not now:
            publish(partial, final)
        if now:
            raise Stop

    with monkeypatch.context() as context:
        context.setattr(rendered_folder, "publish", fail)
        with pytest.raises(Stop):
            render_folder(tmp_path, **SMALL)
    render_folder(tmp_path, **SMALL)
    assert content(tmp_path) == content(whole)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"the disk is full"):
        render_folder(tmp_path, **SMALL)
    assert not (tmp_path / "images" / "val").exists()


def test_what_exists_is_replaced_only_by_force(whole, tmp_path):
    render_folder(tmp_path, **SMALL | {"images": 7, "seed": 3})
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"CLEVR_val_scenes.json exists already; choose another folder or split"):
        render_folder(tmp_path, **SMALL)
    assert content(tmp_path) == before
    render_folder(tmp_path, **SMALL, force=True)
    assert content(tmp_path) == content(whole)


def test_pictures_of_others_are_left_alone(tmp_path):
    """As those of CLEVR's test split, which has no scenes."""
    picture = tmp_path / "images" / "test" / "CLEVR_test_000000.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"theirs")
    with pytest.raises(InputError, match=r"images/test exists already"):
        render_folder(tmp_path, **SMALL | {"split": "test"})
    assert content(tmp_path) == {"images/test/CLEVR_test_000000.png": b"theirs"}


def test_splits_share_a_folder(whole, tmp_path):
    for split, seed in (("val", 0), ("train", 1), ("val", 0)):
        render_folder(tmp_path, **SMALL | {"split": split, "seed": seed}, force=True)
    found = content(tmp_path)
    assert all(found[name] == value for name, value in content(whole).items() if name != "cameras.jsonl")
    lines = [json.loads(line) for line in found["cameras.jsonl"].splitlines()]
    assert sorted((line["split"], line["image_index"]) for line in lines) == [
        (split, number) for split in ("train", "val") for number in range(5)
    ]
    train = ClevrFolder(tmp_path, "train")
    assert len(train) == 5
    (tmp_path / "cameras.jsonl").write_bytes(found["cameras.jsonl"].rstrip())  # as some editors leave it
    render_folder(tmp_path, **SMALL | {"split": "more"})
    assert read_cameras(tmp_path / "cameras.jsonl", split="more").keys() == set(range(5))
    assert read_cameras(tmp_path / "cameras.jsonl", split="val").keys() == set(range(5))
    (tmp_path / "cameras.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match=r"cameras.jsonl is not a file of cameras .*move it away"):
        render_folder(tmp_path, **SMALL | {"split": "new"})


def test_two_writers_are_told_apart(tmp_path, monkeypatch):

    real = rendered_folder.ordered_map
    calls = []

    def first(*arguments, **options):
        calls.append(1)
        monkeypatch.setattr(rendered_folder, "ordered_map", real)
        with pytest.raises(InputError, match="another process is writing"):
            render_folder(tmp_path, **SMALL)
        return real(*arguments, **options)

    monkeypatch.setattr(rendered_folder, "ordered_map", first)
    render_folder(tmp_path, **SMALL)
    assert calls == [1]


def test_conditions_are_kept_and_recorded(tmp_path):
    small = SMALL | {"condition": "cogent-a"}
    render_folder(tmp_path, **small)
    document = json.loads((tmp_path / "scenes" / "CLEVR_val_scenes.json").read_text())
    assert document["info"]["source"]["condition"] == "cogent-a"
    for record in document["scenes"]:
        assert all(obj["color"] in COGENT_A[obj["shape"]] for obj in record["objects"])
    options = ["--images", "3", "--image-size", "8", "--workers", "0", "--condition", "cogent-b"]
    assert main(["render", *options, "--out", str(tmp_path / "a.h5")]) == 0
    with open_set_file(tmp_path / "a.h5") as file:
        assert read_header(file, "a.h5").source["condition"] == "cogent-b"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": 0}, "at least 1 image"),
        ({"width": 4}, "at least 8x8 pixels, got 5 of 4x16"),
        ({"split": "../val"}, "expected a split's name of letters"),
        ({"split": ""}, "expected a split's name of letters"),
        ({"objects": (3, 11)}, "most <= 10"),
        ({"seed": -1}, "a seed of at least 0"),
        ({"condition": "cogent-c"}, "a condition out of clevr, cogent-a, cogent-b, got 'cogent-c'"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        render_folder(tmp_path / "new", **SMALL | change)
    assert os.listdir(tmp_path) == []


def test_cameras_are_found_in_pictures_of_another_size(tmp_path):
    render_folder(tmp_path, **SMALL | {"width": 240, "height": 160, "images": 3, "objects": (5, 6)})
    folder = ClevrFolder(tmp_path, "val")
    known = read_cameras(tmp_path / "cameras.jsonl", split="val")
    for number in range(3):
        np.testing.assert_allclose(folder.camera(number), known[number][0].location, atol=0.02)
