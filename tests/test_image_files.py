"""Images of strangers: no program is started for them, and none takes more memory than a picture does."""

import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from setpred.data.images import FORMATS, MOST_PIXELS, SUFFIXES, TURNS, load_image, open_image
from setpred.errors import InputError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file closefile\nshowpage\n"


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *, colour: int = 2, content: bytes = b"") -> bytes:
    """Says that it has so many pixels; `content` is what it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_no_program_is_started_to_read_one(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    path = tmp_path / "harmless.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(InputError, match=r"harmless\.png is not an image of a format read here \(PNG, JPEG"):
        load_image(path, 8)
    assert not started


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_pictures_are_read(kind, tmp_path):
    path = tmp_path / "picture"
    Image.fromarray(np.full((6, 9, 3), 200, dtype=np.uint8)).save(path, format=kind)
    assert abs(load_image(path, 8).astype(int) - 200).max() < 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_a_folder_is_searched_for_is_of_a_format_that_is_read(suffix):
    assert Image.registered_extensions()[suffix] in FORMATS


TURNED_BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the other turns undo themselves


@pytest.mark.parametrize("orientation", [1, *TURNS, 9])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_turned_photo_is_read_upright(kind, options, orientation, tmp_path):
    """As stored sideways by a camera that notes how it was held; of formats that keep every pixel."""
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    scene.save(tmp_path / "upright", format=kind, **options)
    stored = scene.transpose(TURNED_BACK.get(orientation, TURNS[orientation])) if orientation in TURNS else scene
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "turned", format=kind, exif=note, **options)
    np.testing.assert_array_equal(load_image(tmp_path / "turned", 8), load_image(tmp_path / "upright", 8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # by Pillow
def test_a_damaged_note_turns_nothing(tmp_path):
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    scene.save(tmp_path / "plain.jpg")
    for number, note in enumerate((b"", b"no note", b"MM\0*\0\0\0\x08\0\x01\x01\x12", b"II*\0\xff\xff\xff\xff")):
        scene.save(tmp_path / f"{number}.jpg", exif=b"Exif\0\0" + note)
        np.testing.assert_array_equal(load_image(tmp_path / f"{number}.jpg", 8), load_image(tmp_path / "plain.jpg", 8))


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**13, 2**13 + 1), (10_000, 10_000)]
)
def test_more_pixels_than_a_picture_has_are_refused_before_they_are_made(width, height, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, content=bytes(2**20)))
    made = []
    monkeypatch.setattr(Image.Image, "load", lambda image: made.append(image))
    with pytest.raises(InputError, match=r"bomb\.png"):
        load_image(path, 8)
    assert not made


def test_as_many_pixels_as_a_large_picture_has_are_not(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png(2**13, 2**13))
    with open_image(path) as image:
        assert image.width * image.height == MOST_PIXELS
    with pytest.raises(InputError, match="cut short or damaged"):
        load_image(path, 8)
