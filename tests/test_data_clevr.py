"""CLEVR folders and image files are read as they are written, and missing parts are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from tiny import clevr_folder

from setpred import CLEVR, InputError
from setpred.commands.data import main
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import ClevrImages
from setpred.data.hdf5 import verify
from setpred.data.images import FORMATS, SUFFIXES, TURNS, load_image


def test_elements_and_cameras_are_those_of_the_annotations(clevr_blender):
    folder = ClevrFolder(clevr_blender, "val")
    scenes = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    lines = (clevr_blender / "cameras.jsonl").read_text().splitlines()
    assert len(folder) == len(scenes)
    for number, scene in enumerate(scenes):
        assert folder.path(number).name == scene["image_filename"]
        assert folder.index[number] == scene["image_index"]
        decoded = CLEVR.decode(folder.elements[number])
        assert len(decoded) == len(scene["objects"])
        for got, expected in zip(decoded, scene["objects"], strict=True):
            np.testing.assert_allclose(got["coords"], expected["3d_coords"], atol=1e-6)
            assert all(got[name] == expected[name] for name in ("material", "color", "shape", "size"))
        if number < 20:
            np.testing.assert_allclose(folder.camera(number), json.loads(lines[number])["camera"], atol=1e-3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three small images with a scene each."""
    return clevr_folder(tmp_path / "CLEVR").parents[1]


def test_what_the_official_generator_leaves_is_read(folder):
    """clevr-dataset-gen writes one folder of images and one file of scenes, of the split "new"."""
    expected = ClevrFolder(folder, "val")
    assert len(expected) == 3
    expected_image = expected.image(0, 16)
    for image in (folder / "images" / "val").iterdir():
        image.rename(folder / "images" / image.name)
    (folder / "scenes" / "CLEVR_val_scenes.json").rename(folder / "CLEVR_scenes.json")
    found = ClevrFolder(folder, "new")
    np.testing.assert_array_equal(found.elements, expected.elements)
    np.testing.assert_array_equal(found.image(0, 16), expected_image)
    with pytest.raises(InputError, match="those of new"):
        ClevrFolder(folder, "val")


def test_missing_folders_splits_and_images(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere is no folder; see data/README.md"):
        ClevrFolder(tmp_path / "nowhere", "val")
    with pytest.raises(InputError, match=r"no scenes for the split 'test', only for train and val; in .* those of val"):
        ClevrFolder(folder, "test")
    with pytest.raises(InputError, match=r"the split 'train' has no scenes: expected .*CLEVR_train_scenes.json"):
        ClevrFolder(folder, "train")
    (folder / "images" / "val" / "CLEVR_val_000001.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images are missing in .*, the first is CLEVR_val_000001.png"):
        ClevrFolder(folder, "val")
    shutil.rmtree(folder / "images")
    with pytest.raises(InputError, match=r"cannot read the folder .*val"):
        ClevrFolder(folder, "val")
    with pytest.raises(InputError, match=r"gone\.png is missing"):
        load_image(tmp_path / "gone.png", 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_nothing_is_prepared(folder, tmp_path, workers):
    image = folder / "images" / "val" / "CLEVR_val_000001.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"CLEVR_val_000001\.png is cut short"):
        ClevrImages(folder, image_size=8).__getitems__([0, 1, 2])
    path = tmp_path / "a.h5"
    arguments = ["prepare", str(folder), "--image-size", "8", "--workers", str(workers), "--out", str(path)]
    assert main(arguments) == 2
    assert not path.exists()
    image.write_bytes(content)
    assert main(arguments) == 0
    verify(path)


def test_images_are_resized_without_a_crop(tmp_path):
    """The corners of the picture are the corners of the result."""
    corners = np.zeros((320, 480, 3), np.uint8)
    corners[:160, :240], corners[:160, 240:], corners[160:, :240] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    Image.fromarray(corners).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[[0, 0, -1, -1], [0, -1, 0, -1]], corners[[0, 0, -1, -1], [0, -1, 0, -1]])


def test_formats_and_modes_that_are_read(tmp_path):
    path = tmp_path / "picture"
    for kind in FORMATS:
        Image.fromarray(np.full((6, 9, 3), 200, dtype=np.uint8)).save(path, format=kind)
        assert abs(load_image(path, 8).astype(int) - 200).max() < 3
    for suffix in SUFFIXES:
        assert Image.registered_extensions()[suffix] in FORMATS
    for mode in ("RGBA", "L", "P", "LA", "1", "CMYK"):
        grey = Image.new("RGB", (48, 32), (255, 255, 255)).convert(mode)
        grey.save(path, format="TIFF" if mode == "CMYK" else "PNG")
        np.testing.assert_array_equal(load_image(path, 8), np.full((8, 8, 3), 255))
    for mode, kind in (("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")):  # Pillow would make all but black white
        Image.new(mode, (48, 32), 100 * 257).save(path, format=kind)
        np.testing.assert_array_equal(load_image(path, 8), np.full((8, 8, 3), 100))
    for mode, value in (("F", 0.5), ("I", 2**16)):
        Image.new(mode, (48, 32), value).save(path, format="TIFF")
        with pytest.raises(InputError, match=r"^the image .* has grey values outside 16 bits; convert it to 8 or 16"):
            load_image(path, 8)


TURNED_BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the other turns undo themselves


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_turned_photo_is_read_upright(kind, options, tmp_path):
    """As stored sideways by a camera that notes how it was held; in formats that keep every pixel."""
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    scene.save(tmp_path / "upright", format=kind, **options)
    for orientation in (1, *TURNS, 9):
        turned = orientation in TURNS
        stored = scene.transpose(TURNED_BACK.get(orientation, TURNS[orientation])) if turned else scene
        note = Image.Exif()
        note[ExifTags.Base.Orientation] = orientation
        stored.save(tmp_path / "turned", format=kind, exif=note, **options)
        np.testing.assert_array_equal(load_image(tmp_path / "turned", 8), load_image(tmp_path / "upright", 8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # by Pillow
def test_a_damaged_exif_turns_nothing(tmp_path):
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    scene.save(tmp_path / "plain.jpg")
    for number, note in enumerate((b"", b"no note", b"MM\0*\0\0\0\x08\0\x01\x01\x12", b"II*\0\xff\xff\xff\xff")):
        scene.save(tmp_path / f"{number}.jpg", exif=b"Exif\0\0" + note)
        np.testing.assert_array_equal(load_image(tmp_path / f"{number}.jpg", 8), load_image(tmp_path / "plain.jpg", 8))
