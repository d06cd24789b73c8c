"""One image with the objects predicted on it, outlined and in words: for images of which nobody knows the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from setpred.rendering.camera import NOMINAL_CAMERA
from setpred.schema import ElementSchema
from setpred.visualise.panels import badge, outline_on_image, show_image
from setpred.visualise.style import heading, in_english_order, new_figure, plural, save_png, styled, word

IMAGE, LIST, HEAD = (6.0, 4.0), 3.3, 0.95  # inches
LINE = 0.3  # inches between the lines of the list


@styled()
def draw_outlined_image(
    path: Path, picture: np.ndarray, objects: Sequence[Mapping[str, Any]], *, schema: ElementSchema, about: str = ""
) -> Path:
    """The image with its objects outlined as CLEVR's nominal camera sees them, and the list of them beside it.

    Args:
        path: of the PNG.
        picture: uint8 `[H, W, 3]`; any shape shows CLEVR's 3:2 view, squeezed or not.
        objects: as `ElementSchema.decode` gives them, of a schema with "coords" of three numbers.
        about: a small line beside the title.
    """
    width, height = 0.3 + IMAGE[0] + 0.25 + LIST, HEAD + IMAGE[1] + 0.25
    figure = new_figure(width, height)
    heading(figure, plural(len(objects), "predicted object"), "Most confident first.", about)
    axes = figure.add_axes((0.3 / width, 0.25 / height, IMAGE[0] / width, IMAGE[1] / height))
    show_image(axes, picture)
    fields = in_english_order(schema)
    line = min(LINE, IMAGE[1] / max(len(objects), 1))
    tops = [outline_on_image(axes, obj, NOMINAL_CAMERA) for obj in objects]
    for number, (obj, top) in enumerate(zip(objects, tops, strict=True)):
        if top is not None:
            badge(axes, top, str(number + 1), wrong=False, lift=1)
        words = " ".join(word(obj[field.name]) for field in fields)
        x, y = (0.3 + IMAGE[0] + 0.25) / width, (0.25 + IMAGE[1] - line * (number + 0.5)) / height
        text = f"{number + 1}  {words}, {100 * obj['confidence']:.0f} %"
        figure.text(x, y, text, fontsize=min(9.0, 30 * line), va="center")
    return save_png(figure, path)
