"""Opening image files of anybody: formats that hold pictures only, of a size that memory holds."""

from __future__ import annotations

import os
import warnings

from PIL import ExifTags, Image

from setpred.errors import InputError
from setpred.limits import require_regular

# Pillow knows forty more; one of them, PostScript, is a program, and another program is started to run it
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
