"""Read image files: find, open, turn upright, resize, decode ahead."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from setpred.errors import InputError, plural, shown
from setpred.files import require_regular
from setpred.workers import available_cores, ordered_map

PIXEL_SIZE = (480, 320)  # of CLEVR v1.0's images
# Pillow knows forty more; one of them, PostScript, is a program, and another program is started to run it
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# names of files of these formats; not .pfm, whose numbers are no bytes
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp"),
)
MOST_PIXELS = 2**26  # 8192x8192; a file of a few kilobytes can claim to hold any number of them
MOST_THREADS = 16
REPAIR = "repair it or leave it out"
# EXIF's orientation, and what makes such an image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_OF_PNG = (b"eXIf", b"Raw profile type exif")  # names of the parts of a PNG that hold one
WIDTH, HEIGHT = ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
# what Pillow raises for files that are cut short, damaged or made to look so
_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
# `open_image` raises an error instead; a filter within it would be shared by the threads that decode
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ArrayImage(str):
    """The name of an image of a file of arrays, "cells.npz #3", with its pixels, uint8 `[H, W, 3]`.

    Functions that read image files take it as one.
    """

    pixels: np.ndarray

    def __new__(cls, path: str | os.PathLike[str], number: int, pixels: np.ndarray) -> "ArrayImage":
        image = super().__new__(cls, f"{os.fspath(path)} #{number}")
        image.pixels = pixels
        return image


def image_stem(image: str) -> str:
    """The name of an image without its folder and suffix; that of "cells.npz #3" is "cells-3"."""
    path = Path(image)
    _, _, number = path.suffix.partition(" #")
    return f"{path.stem}-{number}" if number else path.stem


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image without decoding its pixels; use it in a `with`.

    Raises:
        InputError: more pixels than `MOST_PIXELS`; a pipe, a device or a folder, reading which might never end.
        OSError and others of Pillow: a damaged file, or one of another format than `FORMATS`.
    """
    require_regular(path, advice="give an image file")
    image = Image.open(path, formats=FORMATS)
    if image.format == "TIFF":
        image.filename = ""  # else Pillow 13 maps grey pixels with width and height exchanged where the EXIF turns them
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise InputError(f"the image {path} has {width}x{height} pixels, expected {MOST_PIXELS:,}; make it smaller")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned as its EXIF says; a damaged EXIF turns nothing."""
    image.load()  # before the EXIF: of a TIFF Pillow follows it here, and then removes it
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds, and the pixels are in order
        return None


def _eight_bits(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """The image; grey of 16 bits is scaled to 8, where Pillow would clip values above 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) >= 2**16:
        raise InputError(f"the image {path} has grey values outside 16 bits; convert it to 8 or 16 bits first")
    return Image.fromarray((values // 257).astype(np.uint8))


@contextmanager
def _readable(path: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Raise `InputError` with `advice` for what opening or decoding an image within raises."""
    try:
        yield
    except InputError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise InputError(f"the image {path} is missing; {advice}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image of a format read here ({', '.join(FORMATS)}); {advice}") from error
    except _DAMAGED as error:
        raise InputError(f"the image {path} is cut short or damaged ({error}); {advice}") from error


def read_image(path: str | os.PathLike[str], *, advice: str = "unpack CLEVR again") -> Image.Image:
    """Read an image, decoded and upright by EXIF.

    Args:
        advice: what to do about an image that cannot be read, for the message.

    Raises:
        InputError: the file is missing, not an image or cut short; pixels of more than 16 bits, or too many of them.
    """
    if isinstance(path, ArrayImage):
        return Image.fromarray(path.pixels)
    with _readable(path, advice), open_image(path) as image:
        return _eight_bits(_upright(image), path)


def load_image(
    path: str | os.PathLike[str], image_size: int, *, padded: bool = False, advice: str = "unpack CLEVR again"
) -> np.ndarray:
    """Read an image as uint8 `[image_size, image_size, 3]`: RGB, resized bilinearly without a crop.

    Transparent pixels become black, whatever colour the file hides in them.

    Errors as in `read_image`. Source: the published iDSPN recipe (Zhang et al., ICLR 2022, code) resizes so.

    Args:
        padded: pad it with black at right and bottom to a square first, which keeps its aspect ratio.
    """
    return fitted(read_image(path, advice=advice), image_size, padded=padded)


def fitted(image: Image.Image, image_size: int, *, padded: bool = False) -> np.ndarray:
    """Resize an image to uint8 `[image_size, image_size, 3]`; see `load_image`."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("RGB")
    if padded:
        if (longer := max(image.size)) ** 2 > MOST_PIXELS:  # a strip, whose square takes gigabytes
            image = image.resize([max(1, round(side * image_size / longer)) for side in image.size])
        square = Image.new("RGB", (max(image.size),) * 2)
        square.paste(image, (0, 0))
        image = square
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR))


def load_mask(
    path: str | os.PathLike[str], image_size: int, *, size: tuple[int, int], objects: int, advice: str
) -> np.ndarray:
    """Read instances, an indexed or grey image of 8 bits, as uint8 `[image_size, image_size]`, resized to the nearest.

    Args:
        size: width and height of the image that the mask belongs to.
        objects: number of objects in the image, the largest label that a pixel may have.
        advice: what to do about a mask that cannot be used, for the message.

    Raises:
        InputError: the file cannot be read, or has colours, another size or a larger label.
    """
    with _readable(path, advice), open_image(path) as image:
        mask = _upright(image)
    if mask.mode not in ("P", "L", "1"):
        raise InputError(f"{path}: expected a mask of indexed colours or grey of 8 bits, got {mask.mode}; {advice}")
    if mask.size != size:
        expected, got = ("{}x{}".format(*each) for each in (size, mask.size))
        raise InputError(f"{path}: expected a mask of {expected} pixels, as its image, got {got}; {advice}")
    if (most := np.asarray(mask).max()) > objects:
        raise InputError(f"{path}: expected objects 1 to {objects} of its scene in the mask, got {most}; {advice}")
    return np.asarray(mask.resize((image_size, image_size), Image.Resampling.NEAREST)).astype(np.uint8)


def save_mask(file: BinaryIO, labels: np.ndarray) -> None:
    """Write labels uint8 `[height, width]` as a PNG of indexed colours, those of PASCAL VOC: 0 is black."""
    colours, numbers = np.zeros((256, 3), np.uint8), np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * bit + channel) & 1).astype(np.uint8) << (7 - bit)
    image = Image.fromarray(labels)
    image.putpalette(colours.tobytes())
    image.save(file, "png")


def stated_size(path: str | os.PathLike[str], *, advice: str) -> tuple[int, int]:
    """Width and height of the upright image as its header states them, without decoding it.

    Raises:
        InputError: the file is missing or not an image; `advice` says what to do.
    """
    if isinstance(path, ArrayImage):
        return path.pixels.shape[1], path.pixels.shape[0]
    with _readable(path, advice), open_image(path) as image:
        size, turned = image.size, True
        if image.format == "TIFF":  # whose size some versions of Pillow have swapped by now
            size = (image.tag_v2[WIDTH], image.tag_v2[HEIGHT])
        if image.format == "PNG":  # Pillow decodes the pixels to see whether an EXIF follows them
            turned = any(name in Path(path).read_bytes() for name in EXIF_OF_PNG)
        return size[::-1] if turned and _orientation(image) in SIDEWAYS else size


def pixel_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the upright image, without decoding it.

    Those of CLEVR for an image that cannot be read, which raises when its pixels are needed.
    """
    try:
        return stated_size(path, advice="")
    except InputError:
        return PIXEL_SIZE


def find_images(
    sources: Iterable[str | os.PathLike[str]], say: Callable[[str], None] = lambda sentence: None
) -> list[str]:
    """Paths of images: each file of `sources`, and of each folder the files named as images, sorted by name.

    Subfolders, hidden files and files of other names are skipped; `say` gets a sentence about all but the hidden ones.

    Raises:
        InputError: no such file or folder, or a folder without an image.
    """
    found: list[str] = []
    for source in sources:
        if os.path.isfile(source):
            found.append(os.fspath(source))
            continue
        try:
            with os.scandir(source) as entries:
                visible = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", error)  # a ValueError of a NUL has none
            raise InputError(f"no image or folder of images at {source} ({why})") from error
        files, folders = ([name for name, is_dir in visible if is_dir == kind] for kind in (False, True))
        names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
        if not names:
            raise InputError(f"the folder {source} has no image; expected files named {', '.join(SUFFIXES)}")
        if others := sorted(set(files).difference(names)):
            say(f"{source}: skipped {len(others)} files that are not named as images, such as {shown(others[0])}")
        if folders:
            say(f"{source}: skipped {plural(len(folders), 'subfolder')}, such as {shown(min(folders))}")
        found += [os.path.join(source, name) for name in names]
    return found


def decoded(
    paths: Iterable[str], image_size: int, *, padded: bool = False, ahead: int = 128, threads: int | None = None
) -> Iterator[np.ndarray | InputError]:
    """Images uint8 `[image_size, image_size, 3]` in the order of `paths`; an error for each that cannot be read.

    Threads decode while the caller works: Pillow releases the interpreter meanwhile.

    Args:
        padded: see `load_image`.
        ahead: images that are decoded or under way before they are asked for, which bounds the memory.
        threads: all cores by default, but no more than 16.
    """
    load = partial(_load, image_size=image_size, padded=padded)
    return ordered_map(load, paths, workers=threads or min(available_cores(), MOST_THREADS), threads=True, ahead=ahead)


def _load(path: str, image_size: int, padded: bool) -> np.ndarray | InputError:
    try:
        return load_image(path, image_size, padded=padded, advice=REPAIR)
    except InputError as error:
        return error
