"""The CLEVR_v1.0 layout: read as it is written, and every fault of it named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setpred import CLEVR, InputError
from setpred.commands.data import main
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import ClevrImages, SetFile, open_data
from setpred.data.hdf5 import verify
from setpred.data.images import load_image


def test_elements_say_what_the_annotations_say(clevr_blender):
    folder = ClevrFolder(clevr_blender, "val")
    scenes = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    assert len(folder) == len(scenes)
    for number, scene in enumerate(scenes):
        assert folder.path(number).name == scene["image_filename"]
        assert folder.index[number] == scene["image_index"]
        decoded = CLEVR.decode(folder.elements[number])
        assert len(decoded) == len(scene["objects"])
        for got, expected in zip(decoded, scene["objects"], strict=True):
            np.testing.assert_allclose(got["coords"], expected["3d_coords"], atol=1e-6)
            assert all(got[name] == expected[name] for name in ("material", "color", "shape", "size"))


def test_cameras_are_found_from_the_annotations(clevr_blender):
    folder = ClevrFolder(clevr_blender, "val", images=20)
    lines = (clevr_blender / "cameras.jsonl").read_text().splitlines()[:20]
    for number, line in enumerate(lines):
        np.testing.assert_allclose(folder.camera(number), json.loads(line)["camera"], atol=1e-3)


def test_a_prepared_file_is_the_folder(clevr_blender, tmp_path):
    path = tmp_path / "a.h5"
    arguments = ["prepare", str(clevr_blender), "--split", "val", "--image-size", "32", "--images", "6"]
    assert main([*arguments, "--workers", "2", "--out", str(path)]) == 0
    verify(path)
    prepared = open_data(path, image_size=32)
    direct = open_data(clevr_blender, split="val", image_size=32, images=6)
    assert isinstance(prepared, SetFile)
    assert isinstance(direct, ClevrImages)
    assert prepared.source == direct.source
    assert prepared.source["folder"] == clevr_blender.name
    one, other = prepared.__getitems__([4, 0, 5]), direct.__getitems__([4, 0, 5])
    assert all((one[name] == other[name]).all() for name in one)
    np.testing.assert_array_equal(prepared.camera(4), direct.camera(4))
    np.testing.assert_array_equal(prepared.image_index, direct.image_index)


def test_images_are_resized_whole(tmp_path):
    """The corners of the picture are the corners of the result: nothing is cropped."""
    corners = np.zeros((320, 480, 3), np.uint8)
    corners[:160, :240], corners[:160, 240:], corners[160:, :240] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    Image.fromarray(corners).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[[0, 0, -1, -1], [0, -1, 0, -1]], corners[[0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1", "CMYK"])
def test_images_of_other_modes_are_converted(tmp_path, mode):
    grey = Image.new("RGB", (48, 32), (255, 255, 255)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey.save(path)
    np.testing.assert_array_equal(load_image(path, 8), np.full((8, 8, 3), 255))


@pytest.mark.parametrize(("mode", "ending"), [("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif")])
def test_images_of_more_than_8_bits_are_refused(tmp_path, mode, ending):
    """All but black would be white."""
    path = tmp_path / f"a.{ending}"
    Image.new(mode, (48, 32), 300).save(path)
    with pytest.raises(InputError, match=r"^the image .* is grey with more than 8 bits .*; convert it to 8 bits"):
        load_image(path, 8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three small images with a scene each."""
    root = tmp_path / "CLEVR"
    (root / "scenes").mkdir(parents=True)
    (root / "images" / "val").mkdir(parents=True)
    scenes = []
    for number in range(3):
        name = f"CLEVR_val_{number:06d}.png"
        Image.new("RGB", (48, 32), (number, 2, 3)).save(root / "images" / "val" / name)
        obj = {"3d_coords": [1.0, 2.0, 0.7], "pixel_coords": [240, 160, 10.0], "rotation": 0.0}
        obj |= {"shape": "cube", "size": "large", "material": "metal", "color": "red"}
        scenes.append({"image_filename": name, "image_index": number, "split": "val", "objects": [obj, obj]})
    save(root, scenes)
    return root


def save(root: Path, scenes: object) -> None:
    (root / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))


def scenes_of(root: Path) -> list[dict]:
    return json.loads((root / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]


def test_a_sound_folder_is_read(folder):
    assert len(ClevrFolder(folder, "val")) == 3


def test_what_the_official_generator_leaves_is_read(folder):
    """clevr-dataset-gen writes one folder of images and one file of scenes, of the split "new"."""
    expected = ClevrFolder(folder, "val")
    expected_image = expected.image(0, 16)
    for image in (folder / "images" / "val").iterdir():
        image.rename(folder / "images" / image.name)
    (folder / "scenes" / "CLEVR_val_scenes.json").rename(folder / "CLEVR_scenes.json")
    found = ClevrFolder(folder, "new")
    np.testing.assert_array_equal(found.elements, expected.elements)
    np.testing.assert_array_equal(found.image(0, 16), expected_image)
    with pytest.raises(InputError, match="those of new"):
        ClevrFolder(folder, "val")


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is no folder; see data/README.md"):
        ClevrFolder(tmp_path / "nowhere", "val")


def test_the_split_without_scenes(folder):
    with pytest.raises(InputError, match=r"no scenes for the split 'test', only for train and val; in .* those of val"):
        ClevrFolder(folder, "test")
    with pytest.raises(InputError, match=r"the split 'train' has no scenes: expected .*CLEVR_train_scenes.json"):
        ClevrFolder(folder, "train")


def test_broken_json(folder):
    scenes = folder / "scenes" / "CLEVR_val_scenes.json"
    text = scenes.read_text()
    scenes.write_text(text[:200])
    with pytest.raises(InputError, match=r"not valid JSON: .* at character \d+ of 200"):
        ClevrFolder(folder, "val")
    scenes.write_bytes(b'{"info": "\xff"}')
    with pytest.raises(InputError, match="is not valid JSON"):
        ClevrFolder(folder, "val")
    for other in ("[]", "{}", '{"scenes": []}', '{"scenes": 3}', "3"):
        scenes.write_text(other)
        with pytest.raises(InputError, match="expected a list 'scenes'"):
            ClevrFolder(folder, "val")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"color": "mauve"}, "CLEVR_val_000001.png, object 1: unknown color 'mauve'; expected one of cyan"),
        ({"shape": None}, "CLEVR_val_000001.png, object 1: unknown shape None"),
        ({"size": ["large"]}, "CLEVR_val_000001.png, object 1: unknown size"),
        ({"3d_coords": [1, 2]}, "CLEVR_val_000001.png, object 1: coords: expected 3 finite numbers"),
        ({"3d_coords": [1, 2, float("nan")]}, "CLEVR_val_000001.png, object 1: coords: expected 3 finite numbers"),
        ({"3d_coords": "here"}, "CLEVR_val_000001.png, object 1: coords: expected 3 finite numbers"),
        ({"pixel_coords": [1, 2]}, "CLEVR_val_000001.png, object 1: "),
    ],
)
def test_a_wrong_object_is_named(folder, change, words):
    scenes = scenes_of(folder)
    scenes[1]["objects"][1] |= change
    save(folder, scenes)
    with pytest.raises(InputError, match=words):
        ClevrFolder(folder, "val")


@pytest.mark.parametrize("key", ["3d_coords", "color"])
def test_an_object_that_lacks_something_is_named(folder, key):
    scenes = scenes_of(folder)
    del scenes[2]["objects"][0][key]
    save(folder, scenes)
    with pytest.raises(InputError, match=f"CLEVR_val_000002.png, object 0: an object lacks '{key}'"):
        ClevrFolder(folder, "val")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_filename": "../../secret.png"}, "expected a plain file name"),
        ({"image_filename": "/etc/passwd"}, "expected a plain file name"),
        ({"image_filename": ".."}, "expected a plain file name"),
        ({"image_filename": 3}, "expected a plain file name"),
        ({"objects": {}}, "CLEVR_val_000001.png: expected a list 'objects'"),
        ({"image_index": "one"}, "CLEVR_val_000001.png: expected an 'image_index'"),
    ],
)
def test_a_wrong_scene_is_named(folder, change, words):
    scenes = scenes_of(folder)
    scenes[1] |= change
    save(folder, scenes)
    with pytest.raises(InputError, match=words):
        ClevrFolder(folder, "val")


def test_a_scene_without_an_image(folder):
    scenes = scenes_of(folder)
    del scenes[1]["image_filename"]
    save(folder, scenes)
    with pytest.raises(InputError, match="scene 1 has no 'image_filename'"):
        ClevrFolder(folder, "val")


def test_more_objects_than_the_schema_holds(folder):
    scenes = scenes_of(folder)
    scenes[2]["objects"] *= 6
    save(folder, scenes)
    with pytest.raises(InputError, match=r"CLEVR_val_000002.png has 12 objects, but schema 'clevr' holds at most 10"):
        ClevrFolder(folder, "val")


def test_a_missing_image(folder):
    (folder / "images" / "val" / "CLEVR_val_000001.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images are missing in .*, the first is CLEVR_val_000001.png"):
        ClevrFolder(folder, "val")
    shutil.rmtree(folder / "images")
    with pytest.raises(InputError, match=r"cannot read the folder .*val"):
        ClevrFolder(folder, "val")


@pytest.mark.parametrize(("damage", "workers"), [("text", 0), ("empty", 0), ("cut", 0), ("cut", 1)])
def test_an_image_that_is_none(folder, tmp_path, damage, workers):
    image = folder / "images" / "val" / "CLEVR_val_000001.png"
    content = image.read_bytes()
    image.write_bytes({"text": b"hello", "empty": b"", "cut": content[: len(content) // 2]}[damage])
    words = "CLEVR_val_000001.png is cut short" if damage == "cut" else "CLEVR_val_000001.png is not an image"
    with pytest.raises(InputError, match=words):
        ClevrImages(folder, image_size=8).__getitems__([0, 1, 2])
    arguments = [
        "prepare",
        str(folder),
        "--image-size",
        "8",
        "--workers",
        str(workers),
        "--out",
        str(tmp_path / "a.h5"),
    ]
    assert main(arguments) == 2
    assert not (tmp_path / "a.h5").exists()
    image.write_bytes(content)
    assert main(arguments) == 0
    verify(tmp_path / "a.h5")


def test_an_image_that_vanishes(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png is missing"):
        load_image(tmp_path / "gone.png", 8)
