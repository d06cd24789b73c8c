"""CLEVR folders and image files: read as they are written, every fault of them named, and safe to open."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from setpred import CLEVR, InputError
from setpred.commands.data import main
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import ClevrImages, SetFile, open_data
from setpred.data.hdf5 import verify
from setpred.data.images import FORMATS, MOST_PIXELS, SUFFIXES, TURNS, load_image, open_image

# --- real scenes --------------------------------------------------------------------------------------------------


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


# --- faults of a folder -------------------------------------------------------------------------------------------


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
    (root / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))
    return root


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


def test_damaged_json(folder):
    scenes = folder / "scenes" / "CLEVR_val_scenes.json"
    cut = scenes.read_bytes()[:200]
    for content in (cut, b'{"info": "\xff"}'):
        scenes.write_bytes(content)
        with pytest.raises(InputError, match=rf"of {len(content)} bytes is not valid JSON"):
            ClevrFolder(folder, "val")
    for other in ("[]", "{}", '{"scenes": []}', '{"scenes": 3}', "3"):
        scenes.write_text(other)
        with pytest.raises(InputError, match="expected a list 'scenes'"):
            ClevrFolder(folder, "val")


ABSENT = object()
NAME = "CLEVR_val_000001.png"


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        ("object", {"color": "mauve"}, f"{NAME}, object 1: unknown color 'mauve'; expected one of cyan"),
        ("object", {"shape": None}, f"{NAME}, object 1: unknown shape None"),
        ("object", {"size": ["large"]}, f"{NAME}, object 1: unknown size"),
        ("object", {"3d_coords": [1, 2]}, f"{NAME}, object 1: coords: expected 3 finite numbers"),
        ("object", {"3d_coords": [1, 2, float("nan")]}, f"{NAME}, object 1: coords: expected 3 finite numbers"),
        ("object", {"3d_coords": "here"}, f"{NAME}, object 1: coords: expected 3 finite numbers"),
        *(("object", {"pixel_coords": wrong}, f"{NAME}, object 1: ") for wrong in ([1, 2], ["1", "2", "3"], "123", 5)),
        *(("object", {key: ABSENT}, f"{NAME}, object 1: an object lacks '{key}'") for key in ("3d_coords", "color")),
        *(
            ("scene", {"image_filename": wrong}, "expected a plain file name")
            for wrong in ("../../secret.png", "/etc/passwd", "..", 3)
        ),
        ("scene", {"image_filename": ABSENT}, "scene 1 has no 'image_filename'"),
        ("scene", {"objects": {}}, f"{NAME}: expected a list 'objects'"),
        ("scene", {"image_index": "one"}, f"{NAME}: expected an 'image_index'"),
        ("scene", {"objects": [{}] * 12}, f"{NAME} has 12 objects, but schema 'clevr' holds at most 10"),
    ],
)
def test_a_wrong_annotation_is_named(folder, where, change, words):
    path = folder / "scenes" / "CLEVR_val_scenes.json"
    document = json.loads(path.read_text())
    scene = document["scenes"][1]
    changed = scene if where == "scene" else scene["objects"][1]
    changed |= change
    for key in [key for key, value in change.items() if value is ABSENT]:
        del changed[key]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=words):
        ClevrFolder(folder, "val")


@pytest.mark.parametrize(("damage", "workers"), [("text", 0), ("empty", 0), ("cut", 0), ("cut", 1)])
def test_a_damaged_image(folder, tmp_path, damage, workers):
    image = folder / "images" / "val" / NAME
    content = image.read_bytes()
    image.write_bytes({"text": b"hello", "empty": b"", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(InputError, match=NAME + (" is cut short" if damage == "cut" else " is not an image")):
        ClevrImages(folder, image_size=8).__getitems__([0, 1, 2])
    path = tmp_path / "a.h5"
    arguments = ["prepare", str(folder), "--image-size", "8", "--workers", str(workers), "--out", str(path)]
    assert main(arguments) == 2
    assert not path.exists()
    image.write_bytes(content)
    assert main(arguments) == 0
    verify(path)


# --- images -------------------------------------------------------------------------------------------------------


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


def test_no_program_is_started_to_read_one(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    path = tmp_path / "harmless.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file closefile\n")
    with pytest.raises(InputError, match=r"harmless\.png is not an image of a format read here \(PNG, JPEG"):
        load_image(path, 8)
    assert not started


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


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def claimed(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG that claims so many pixels; `content` is what it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_more_pixels_than_a_picture_has_are_an_error_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(claimed(2**13, 2**13))  # as many as allowed
    with open_image(path) as image:
        assert image.width * image.height == MOST_PIXELS
    with pytest.raises(InputError, match="cut short or damaged"):
        load_image(path, 8)
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda image: decoded.append(image))
    for side in (2**31 - 1, 100_000, 2**13 + 1, 10_000):
        path.write_bytes(claimed(side, side, content=bytes(2**20)))
        with pytest.raises(InputError, match=r"bomb\.png"):
            load_image(path, 8)
    assert not decoded
