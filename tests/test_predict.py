"""predict: image files in, objects out, independently of batches; broken images named."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from setpred.checkpoint.load import load_checkpoint
from setpred.commands import predict as command
from setpred.commands.predict import predict, run
from setpred.data import images as pictures
from setpred.data.arrays import array_images
from setpred.data.images import decoded, find_images, load_image, pixel_size
from setpred.errors import InputError
from setpred.schema import CLEVR

EVERYTHING = "--threshold=0"  # an untrained model is sure of nothing


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images of several sizes and kinds, and what is to be left alone."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, size in (("b.png", (48, 32)), ("a.jpg", (30, 60)), ("c.JPEG", (16, 16)), ("d.PNG", (5, 7))):
        Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    Image.new("L", (20, 20), 130).save(folder / "e.png")
    Image.new("RGBA", (20, 20), (200, 30, 30, 90)).save(folder / "f.png")
    Image.new("P", (20, 20), 3).save(folder / "g.png")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "h.png").write_bytes(b"")
    (folder / "h.png").mkdir()
    (folder / "._a.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def broken(folder, tmp_path):
    """A folder of three images, of which the one in the middle is cut short."""
    for name, source in (("1.png", "b.png"), ("3.png", "e.png")):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_bytes((folder / source).read_bytes())
    (tmp_path / "broken" / "2.png").write_bytes((folder / "b.png").read_bytes()[:500])
    return tmp_path / "broken"


def elements(model, paths, **options):
    found = []
    for _, prediction in predict(model, paths, image_size=16, **options):
        assert torch.is_grad_enabled()  # for the caller
        found.append(prediction)
    return torch.stack(found)


def test_folders_are_read_one_level_deep_and_sorted(folder, tmp_path):
    names = [os.path.basename(path) for path in find_images([folder])]
    assert names == ["a.jpg", "b.png", "c.JPEG", "d.PNG", "e.png", "f.png", "g.png"]
    assert find_images([folder / "notes.txt", folder / "b.png"]) == [str(folder / "notes.txt"), str(folder / "b.png")]
    with pytest.raises(InputError, match=r"no image or folder of images at .*nowhere"):
        find_images([folder, tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"has no image; expected files named \.png"):
        find_images([tmp_path])


def test_images_of_every_format_are_found_and_skipped_files_are_named(tmp_path, capsys, checkpoint):
    names = ["a.png", "b.webp", "c.tif", "d.BMP", "e.jfif", "f.jpe"]
    for name in names:
        Image.new("RGB", (20, 20), (90, 10, 50)).save(tmp_path / name, format="JPEG" if name > "e" else None)
    assert [os.path.basename(path) for path in find_images([tmp_path], pytest.fail)] == names
    for name in ("h.heic", "notes.txt", ".hidden"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    run([str(checkpoint), str(tmp_path), "--out", str(tmp_path / "out" / "p.json"), "--skip-broken"])
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: skipped 2 files that are not named as images, such as 'h.heic'" in said
    assert f"{tmp_path}: skipped 1 subfolder, such as 'more'" in said
    assert [line.partition(";")[0] for line in said if line.startswith("skipped: ")] == [
        f"skipped: the image {tmp_path / 'gone.png'} is missing"
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_batches_or_threads(model, folder, threads):
    paths = find_images([folder])
    images = np.stack([load_image(Path(path), 16) for path in paths]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(torch.from_numpy(images))
    for batch_size in (1, 3, 7, 64):
        found = elements(model, paths, batch_size=batch_size, threads=threads)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(elements(model, paths, iterations=1), expected)


def test_a_prediction_does_not_depend_on_the_other_images(model, folder, broken):
    image, bad = str(folder / "b.png"), str(broken / "2.png")
    first, second = elements(model, [image, image])
    assert torch.equal(first, second)
    skipped, kept = predict(model, [bad, image], image_size=16, skip_broken=True)
    assert isinstance(skipped.elements, InputError)
    assert torch.equal(kept.elements, first)


def test_images_are_decoded_a_little_ahead_only(model, folder, monkeypatch):
    started = []
    load = pictures._load
    monkeypatch.setattr(pictures, "_load", lambda path, **sizes: started.append(path) or load(path, **sizes))
    found = predict(model, (str(folder / "b.png") for _ in range(10**9)), image_size=16, batch_size=2)
    for _ in range(5):
        next(found)
    assert 5 <= len(started) <= 12
    found.close()
    assert len(started) <= 12


def test_threads_keep_the_order():
    paths = [f"nowhere/{number}.png" for number in range(50)]
    for path, error in zip(paths, decoded(paths, 8, ahead=7, threads=4), strict=True):
        assert f"the image {path} is missing" in str(error)


def test_objects_are_those_of_the_schema(checkpoint, model, folder, tmp_path, capsys):
    out, lines = tmp_path / "deep" / "predictions.json", tmp_path / "predictions.jsonl"
    tally = run([str(checkpoint), str(folder), "--out", str(out), "--batch-size", "3", EVERYTHING])
    assert (tally.predicted, tally.skipped) == (7, 0)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 7 images, ")
    assert printed.count("\n") == 1
    paths, written = find_images([folder]), json.loads(out.read_text())
    assert [record["image"] for record in written] == paths
    for record, expected in zip(written, elements(model, paths), strict=True):
        objects = CLEVR.decode(expected, threshold=-99)
        assert [obj["shape"] for obj in record["objects"]] == [obj["shape"] for obj in objects]
        confidences = [obj["confidence"] for obj in record["objects"]]
        assert confidences == sorted(confidences, reverse=True)
        np.testing.assert_allclose(record["objects"][0]["coords"], objects[0]["coords"], atol=1e-4)
    run([str(checkpoint), str(folder), "--out", str(lines), EVERYTHING])
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(record["image"], len(record["objects"])) for record in again] == [(path, 4) for path in paths]
    run([str(checkpoint), str(folder), "--out", str(out), "--threshold", "1"])
    assert all(not record["objects"] for record in json.loads(out.read_text()))  # no confidence reaches 1


def test_images_of_arrays_predict_as_files_of_the_same_pixels(checkpoint, tmp_path):
    """By name, in every layout, next to files, in formats and figures; pixels of arrays are those of their images."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    np.savez(tmp_path / "a.npz", images=pixels, coords=np.zeros((3, 2, 2)))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = pixels.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "c.npz", inputs=np.zeros((3, 4)))

    def predicted(*sources, out="out.json", options=()):
        paths = [str(tmp_path / source) for source in sources]
        run([str(checkpoint), *paths, "--out", str(tmp_path / out), EVERYTHING, *options])
        return (tmp_path / out).read_text()

    expected = [each["objects"] for each in json.loads(predicted(*files))]
    found = json.loads(predicted("a.npz", "0.png", "b.h5", options=["--figures", str(tmp_path / "drawn"), "--shown=5"]))
    assert [each["objects"] for each in found] == [*expected, expected[0], *expected]
    names = [f"{tmp_path / 'a.npz'} #{k}" for k in range(3)]
    assert [each["image"] for each in found][:4] == [*names, str(tmp_path / "0.png")]
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["000-a-0.png", "001-a-1.png", "002-a-2.png", "003-0.png", "004-b-0.png"]
    assert f"{names[0]}," in predicted("a.npz", out="out.csv")
    assert [pixel_size(image) for image in array_images(tmp_path / "b.h5")] == [(30, 20)] * 3
    with pytest.raises(InputError, match=r"c\.npz: expected an array 'images', got inputs"):
        predicted("c.npz", out="none.json")
    with pytest.raises(InputError, match="the command reads this file"):
        predicted("a.npz", out="a.npz")
    assert not (tmp_path / "none.json").exists()


def test_a_broken_image_stops_it_before_anything_is_written(checkpoint, broken, tmp_path):
    out = tmp_path / "predictions.json"
    out.write_text("[]")
    with pytest.raises(InputError, match=r"2\.png is cut short or damaged .*; repair it or leave it out"):
        run([str(checkpoint), str(broken), "--out", str(out), "--batch-size", "1", "--figures", str(tmp_path / "f")])
    assert out.read_text() == "[]"
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.json", "broken"}


@pytest.mark.parametrize("batch_size", ["1", "64"])
def test_broken_images_are_skipped_counted_and_named(checkpoint, broken, tmp_path, capsys, batch_size):
    out = tmp_path / "predictions.json"
    tally = run([str(checkpoint), str(broken), "--out", str(out), "--skip-broken", "--batch-size", batch_size])
    assert (tally.predicted, tally.skipped) == (2, 1)
    assert [os.path.basename(record["image"]) for record in json.loads(out.read_text())] == ["1.png", "3.png"]
    printed = capsys.readouterr()
    assert ", 1 skipped" in printed.out
    assert f"skipped: the image {broken / '2.png'}" in printed.err


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_nothing_left_is_still_valid(checkpoint, folder, tmp_path, ending):
    out = tmp_path / f"predictions.{ending}"
    tally = run([str(checkpoint), str(folder / "notes.txt"), "--out", str(out), "--skip-broken"])
    assert (tally.predicted, tally.skipped) == (0, 1)
    assert json.loads(out.read_text()) == [] if ending == "json" else out.read_text() == ""


@pytest.mark.parametrize("threshold", ["50", "-0.1", "nan"])
def test_a_threshold_that_is_no_confidence_is_an_error_before_predicting(threshold, checkpoint, folder, tmp_path):
    with pytest.raises(InputError, match="--threshold: expected a confidence"):
        run([str(checkpoint), str(folder), "--out", str(tmp_path / "p.json"), f"--threshold={threshold}"])
    assert list(tmp_path.iterdir()) == []


def test_figures_show_the_first_images_and_fail_after_the_predictions(checkpoint, broken, tmp_path, monkeypatch):
    out, figures = tmp_path / "p.json", tmp_path / "figures"
    arguments = [str(checkpoint), str(broken), str(broken / "1.png"), "--out", str(out), "--skip-broken", EVERYTHING]
    arguments += ["--figures", str(figures), "--shown", "2"]
    run(arguments)
    drawn = sorted(figures.iterdir())
    assert [path.name for path in drawn] == ["000-1.png", "001-3.png"]
    with Image.open(drawn[0]) as picture:
        assert picture.size[0] > 800
    out.unlink()

    def full(*_, **__):
        raise InputError("the disk is full")

    monkeypatch.setattr(command, "draw_outlined_image", full)
    with pytest.raises(InputError, match=r"the disk is full; the predictions are in .*p\.json"):
        run(arguments)
    assert len(json.loads(out.read_text())) == 3
