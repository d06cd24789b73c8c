"""Read image files: find, open, turn upright, resize, decode ahead."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from setpred.data.workers import available_cores
from setpred.errors import InputError, shown
from setpred.files import require_regular

# Pillow knows forty more; one of them, PostScript, is a program, and another program is started to run it
PIXEL_SIZE = (480, 320)  # of CLEVR v1.0's images
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# what files of these formats are named; not .pfm, whose numbers are no bytes
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp"),
)
MOST_PIXELS = 2**26  # 8192x8192; a file of a few kilobytes can claim to hold any number of them
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
# what Pillow raises for files that are cut short, damaged or made to look so
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
# `open_image` says it in a sentence; not within it, for threads decode and share the filters
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image whose pixels have not been decoded yet; use it in a `with`. Links are followed, to regular files only.

    Raises:
        InputError: more pixels than `MOST_PIXELS`; a pipe, a device or a folder, which might never end.
        BROKEN: a file that is not of one of `FORMATS`, or damaged; decoding it may raise them, too.
    """
    require_regular(path, advice="give an image file")
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise InputError(
            f"the image {path} has {image.width}x{image.height} pixels, expected at most {MOST_PIXELS:,} in all; make "
            "it smaller, a model sees it at a fraction of that"
        )
    return image


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded, as people see it: turned as the camera has noted in its EXIF.

    Raises:
        BROKEN: damaged pixels. A damaged note turns nothing.
    """
    image.load()  # before the note: of a TIFF Pillow follows it here, and then takes it away
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many kinds, and the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def load_image(path: Path, image_size: int, *, advice: str = "unpack CLEVR again") -> np.ndarray:
    """A whole image as uint8 `[image_size, image_size, 3]`: RGB, upright by EXIF, resized bilinearly without a crop.

    Args:
        advice: what to do about an image that cannot be read, for the message.

    Source: the published iDSPN recipe (Zhang et al., ICLR 2022, code) resizes so.

    Raises:
        InputError: the file is missing, not an image or cut short; pixels of more than 8 bits, or too many of them.
    """
    try:
        with open_image(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut what is above 255 off
                raise InputError(
                    f"the image {path} is grey with more than 8 bits a pixel (mode {image.mode}), expected 8 bits; "
                    "convert it to 8 bits first"
                )
            resized = upright(image).convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
    except InputError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise InputError(f"the image {path} is missing; {advice}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image of a format read here ({', '.join(FORMATS)}); {advice}") from error
    except BROKEN as error:
        raise InputError(f"the image {path} is cut short or damaged ({error}); {advice}") from error
    return np.asarray(resized)


def pixel_size(path: Path) -> tuple[int, int]:
    """Width and height; CLEVR's own where the image cannot be read, which is said when it is needed."""
    try:
        with open_image(path) as image:
            return upright(image).size
    except BROKEN:
        return PIXEL_SIZE


MOST_THREADS = 16


def find_images(
    sources: Iterable[str | os.PathLike[str]], say: Callable[[str], None] = lambda sentence: None
) -> list[str]:
    """Paths of images: each file of `sources` as it is, of each folder those named as images, sorted by name.

    Folders within folders and hidden files are left out, and so are files of other names, which `say` is told.

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
                files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", error)  # a ValueError of a NUL has none
            raise InputError(f"no image or folder of images at {source} ({why})") from error
        names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
        if not names:
            raise InputError(f"the folder {source} has no image; expected files named {', '.join(SUFFIXES)}")
        if others := sorted(set(files).difference(names)):
            say(f"{source}: skipped {len(others)} files that are not named as images, such as {shown(others[0])}")
        found += [os.path.join(source, name) for name in names]
    return found


def decoded(
    paths: Iterable[str], image_size: int, *, ahead: int = 128, threads: int | None = None
) -> Iterator[np.ndarray | InputError]:
    """Images uint8 `[image_size, image_size, 3]` in the order of `paths`; for a broken one what is wrong with it.

    Threads decode while the caller does something else: Pillow lets go of the interpreter meanwhile.

    Args:
        ahead: how many are decoded or under way before they are asked for; that much memory is needed.
        threads: all cores unless given, but no more than 16.
    """
    remaining = iter(paths)
    executor = ThreadPoolExecutor(threads or min(available_cores(), MOST_THREADS))
    load = partial(_load, image_size=image_size)
    try:
        pending = deque(executor.submit(load, path) for path in itertools.islice(remaining, ahead))
        while pending:
            image = pending.popleft().result()
            pending.extend(executor.submit(load, path) for path in itertools.islice(remaining, 1))
            yield image
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _load(path: str, image_size: int) -> np.ndarray | InputError:
    try:
        return load_image(Path(path), image_size, advice="mend it or leave it out")
    except InputError as error:
        return error
