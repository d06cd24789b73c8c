"""Segmentations of images by slots or supports next to the true ones, and their refinement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from setpred.errors import plural
from setpred.matching import hungarian
from setpred.metrics import contingency, segmentation_scores
from setpred.visualise.refinement import MOST_COLUMNS, STRIP
from setpred.visualise.style import DISTINCT, INK, Sheet, styled

SIDE, GAP, FOOT, HEAD = 1.3, 0.1, 0.34, 1.2  # inches; the foot has the text over the next row
MOST_PARTS = 12  # columns of slots
GROUND_COLOUR = "#d9d9d5"  # of the background, unlike any of DISTINCT
WIDEST = 1.5  # width over height of a panel of CLEVR's world
_ABOUT_COLOURS = "A predicted segment has the colour of the true one that it overlaps most, matched one to one"


@dataclass(frozen=True)
class SegmentedImage:
    """An image, its true instances and its predicted labels.

    Args:
        name: text over its row.
        picture: uint8 `[S, S, 3]`.
        instances: integers `[S, S]`; 0 is the background.
        labels: predicted labels `[steps + 1, S, S]` at every iterate, the last one being the prediction.
        parts: by its name, the label of each segment and its colours times its mask on white, float `[T, T, 3]`.
        reconstruction: float `[T, T, 3]`; None of models that do not draw.
    """

    name: str
    picture: np.ndarray
    instances: np.ndarray
    labels: np.ndarray
    parts: Mapping[str, tuple[int, np.ndarray]]
    reconstruction: np.ndarray | None = None

    @cached_property
    def colours(self) -> dict[int, str]:
        """The colour of each predicted label, that of its true segment in the last iterate."""
        true, guess = (sorted({0, *np.unique(each).tolist()}) for each in (self.instances, self.labels[-1]))
        counts = contingency(*self._tensors(-1))[0].double()
        union = counts.sum(1, keepdim=True) + counts.sum(0) - counts
        overlap = counts / union.clamp(min=1)
        some = torch.ones(1, len(guess)).bool(), torch.ones(1, len(true)).bool()
        partners = hungarian(-overlap.mT[None], *some)[0].tolist()  # the predicted rank of each true segment
        pairs = [(row, k) for row, k in enumerate(partners) if k >= 0 and counts[row, k] > 0]
        found = {guess[k]: true_colour(true[row]) for row, k in pairs}
        taken = {true_colour(label) for label in true}
        others = [label for label in np.unique([*self.labels.flat]).tolist() if label not in found]
        free = [colour for colour in DISTINCT if colour not in taken] or list(DISTINCT)
        return found | {label: free[k % len(free)] for k, label in enumerate(others)}

    def _tensors(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.from_numpy(each.astype(np.int64))[None] for each in (self.labels[step], self.instances))

    def scores(self, step: int = -1) -> str:
        """FG-ARI and mIoU of an iterate in %."""
        found = segmentation_scores(*self._tensors(step))
        return f"FG-ARI {100 * found['fg_ari'].item():.0f}, mIoU {100 * found['miou'].item():.0f}"

    def painted(self, step: int = -1) -> np.ndarray:
        """The predicted segments of an iterate in their colours, float `[S, S, 3]`."""
        return paint(self.labels[step], self.colours)

    @property
    def truth(self) -> np.ndarray:
        """The true segments in their colours, float `[S, S, 3]`."""
        return paint(self.instances, {label: true_colour(label) for label in np.unique(self.instances).tolist()})


def true_colour(label: int) -> str:
    """The colour of a true segment."""
    return DISTINCT[(label - 1) % len(DISTINCT)] if label else GROUND_COLOUR


def paint(labels: np.ndarray, colours: Mapping[int, str]) -> np.ndarray:
    """Paint integer labels `[H, W]`: float `[H, W, 3]`."""
    painted = np.ones((*labels.shape, 3))
    for label, colour in colours.items():
        painted[labels == label] = to_rgb(colour)
    return painted


@styled()
def draw_segmentation(path: Path, images: Sequence[SegmentedImage], *, aspect: float = 1.0, about: str = "") -> Path:
    """Draw a row for each image: image, reconstruction if any, segmentation, truth, and each segment alone.

    Args:
        aspect: width over height of the view; a square image is stretched to it.
        about: small text right of the title.
    """
    drawn = images[0].reconstruction is not None
    names = ["image", *["reconstruction"] * drawn, "predicted", "true"]
    most = max(len(image.parts) for image in images)
    columns, width = len(names) + min(most, MOST_PARTS), SIDE * aspect
    sheet = _sheet(columns, len(images), width)
    alone = "its colours times its mask, on white" if drawn else "the image times its support, on white"
    hidden = f"; {MOST_PARTS} of {most} shown" if most > MOST_PARTS else ""
    sheet.heading("Segmentation", f"{_ABOUT_COLOURS}. Right: each segment alone, {alone}{hidden}. Scores in %.", about)
    for row, image in enumerate(images):
        cells = _row(sheet, row, columns, width, f"{image.name}: {image.scores()}")
        shown = [image.picture, *([image.reconstruction] if drawn else []), image.painted(), image.truth]
        for cell, name, picture in zip(cells, names, shown, strict=False):
            _show(cell, picture, name, smooth=name in ("image", "reconstruction"))
        parts = list(image.parts.items())[:MOST_PARTS]
        for cell, (name, (label, part)) in zip(cells[len(names) :], parts, strict=False):
            _show(cell, part, name, smooth=True, edge=image.colours.get(label))
        for cell in cells[len(names) + len(parts) :]:
            cell.set_axis_off()
    return sheet.save(path)


@styled()
def draw_segmentation_refinement(
    path: Path, images: Sequence[SegmentedImage], *, aspect: float = 1.0, about: str = ""
) -> Path:
    """Draw a row for each image: the image, the true segmentation and the predicted one at a few iterations.

    Arguments as of `draw_segmentation`.
    """
    last = len(images[0].labels) - 1
    steps = [*[step for step in STRIP if step < last][: MOST_COLUMNS - 1], last]
    columns, width = 2 + len(steps), SIDE * aspect
    sheet = _sheet(columns, len(images), width, text=1)
    sheet.heading("Segmentation at every iteration", f"{_ABOUT_COLOURS} at the end. Scores in %.", about)
    for row, image in enumerate(images):
        cells = _row(sheet, row, columns, width, image.name, text=1)
        _show(cells[0], image.picture, "image", smooth=True)
        _show(cells[1], image.truth, "true")
        for cell, step in zip(cells[2:], steps, strict=True):
            name = f"after {plural(step, 'step')}" if step else "start"
            _show(cell, image.painted(step), f"{name}\n{image.scores(step)}")
    return sheet.save(path)


def _sheet(columns: int, rows: int, width: float, *, text: int = 0) -> Sheet:
    """A sheet for rows of panels with `text` more lines under each."""
    wide = max(0.3 + columns * (width + GAP) + 0.2, 11.0)  # room for the subtitle
    return Sheet(wide, HEAD + rows * (SIDE + 2 * FOOT * 0.75 + 0.14 * text) + 0.1)


def _row(sheet: Sheet, row: int, columns: int, width: float, title: str, *, text: int = 0) -> list[Axes]:
    step = SIDE + 2 * FOOT * 0.75 + 0.14 * text
    bottom = sheet.height - HEAD - row * step - SIDE
    sheet.note(0.3, bottom + SIDE + 0.12, title, fontsize=10, parse_math=False)
    return [sheet.panel(0.3 + k * (width + GAP), bottom, width, SIDE) for k in range(columns)]


def _show(axes: Axes, picture: np.ndarray, name: str, *, smooth: bool = False, edge: str | None = None) -> None:
    axes.imshow(picture, aspect="auto", interpolation="bicubic" if smooth else "nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=edge or "#cfcfca", linewidth=2.5 if edge else 0.6)
    axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=INK)
