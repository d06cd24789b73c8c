"""Images of strangers: no program is started for them, and none takes more memory than a picture does."""

import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from setpred.data.clevr import load_image
from setpred.data.image_files import FORMATS, MOST_PIXELS, open_image
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
