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

SIDE, GAP, HEAD = 1.3, 0.1, 1.2  # inches: panels, between them, title
BETWEEN, LINE = 0.51, 0.14  # inches between rows, for a title and a line under the panels, and for each further line
LEAST_WIDTH = 11.0  # inches, of the subtitle
MOST_PARTS = 12  # columns of slots
GROUND_COLOUR = "#d9d9d5"  # of the background, unlike any of DISTINCT
WIDEST = 1.5  # width over height of a panel of CLEVR's world
_MATCHED = "A predicted segment has the colour of the true one that it overlaps most, matched one to one"


@dataclass(frozen=True)
class SegmentedImage:
    """An image, its true instances and its predicted labels.

    Args:
        name: text over its row.
        picture: uint8 `[S, S, 3]`.
        instances: integers `[S, S]`; 0 is the background. None where they are not known.
        labels: predicted labels `[steps + 1, S, S]` at every iterate, the last one being the prediction.
        parts: by its name, the label of each segment and its colours times its mask on white, float `[T, T, 3]`.
        reconstruction: float `[T, T, 3]`; None of models that do not draw.
    """

    name: str
    picture: np.ndarray
    instances: np.ndarray | None
    labels: np.ndarray
    parts: Mapping[str, tuple[int, np.ndarray]]
    reconstruction: np.ndarray | None = None

    @cached_property
    def colours(self) -> dict[int, str]:
        """The colour of each predicted label, that of its true segment in the last iterate.

        Without instances the background is grey: the part of this name, or the label with most pixels.
        """
        labels = np.unique(self.labels).tolist()
        if self.instances is None:
            largest = int(np.bincount(self.labels[-1].ravel()).argmax())
            ground, _ = self.parts.get("background", (largest, None))
            others = [label for label in labels if label != ground]
            return {ground: GROUND_COLOUR} | {each: DISTINCT[k % len(DISTINCT)] for k, each in enumerate(others)}
        true, guess = (sorted({0, *np.unique(each).tolist()}) for each in (self.instances, self.labels[-1]))
        counts = contingency(*self._tensors(-1))[0].double()
        union = counts.sum(1, keepdim=True) + counts.sum(0) - counts
        overlap = counts / union.clamp(min=1)
        some = torch.ones(1, len(guess)).bool(), torch.ones(1, len(true)).bool()
        partners = hungarian(-overlap.mT[None], *some)[0].tolist()  # the predicted rank of each true segment
        pairs = [(row, k) for row, k in enumerate(partners) if k >= 0 and counts[row, k] > 0]
        found = {guess[k]: true_colour(true[row]) for row, k in pairs}
        taken = {true_colour(label) for label in true}
        others = [label for label in labels if label not in found]
        free = [colour for colour in DISTINCT if colour not in taken] or list(DISTINCT)
        return found | {label: free[k % len(free)] for k, label in enumerate(others)}

    def _tensors(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.from_numpy(each.astype(np.int64))[None] for each in (self.labels[step], self.instances))

    def scores(self, step: int = -1) -> str:
        """FG-ARI and mIoU of an iterate in %; nothing without instances or objects."""
        if self.instances is None or not self.instances.any():
            return ""
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
    """Draw a row for each image: image, reconstruction if any, segmentation, truth if known, and each segment alone.

    Args:
        images: all with instances, or none; all with a reconstruction, or none.
        aspect: width over height of the view; a square image is stretched to it.
        about: small text right of the title.
    """
    drawn, known = images[0].reconstruction is not None, images[0].instances is not None
    most = max(len(image.parts) for image in images)
    columns = 2 + drawn + known + min(most, MOST_PARTS)
    alone = "its colours times its mask" if drawn else "the image times its support"
    hidden = f"; {MOST_PARTS} of {most} are shown" if most > MOST_PARTS else ""
    subtitle = f"Right: each segment alone, {alone}, on white{hidden}."
    sheet = _sheet(columns, len(images), aspect)
    sheet.heading("Segmentation", f"{_MATCHED}. {subtitle} Scores in %." if known else subtitle, about)
    for row, image in enumerate(images):
        cells = iter(_row(sheet, row, columns, aspect, ": ".join(filter(None, (image.name, image.scores())))))
        _show(next(cells), image.picture, "image", smooth=True)
        if drawn:
            _show(next(cells), image.reconstruction, "reconstruction", smooth=True)
        _show(next(cells), image.painted(), "predicted")
        if known:
            _show(next(cells), image.truth, "true")
        for (name, (label, part)), cell in zip(image.parts.items(), cells, strict=False):
            _show(cell, part, name, smooth=True, edge=image.colours.get(label))
        for cell in cells:
            cell.set_axis_off()
    return sheet.save(path)


@styled()
def draw_segmentation_refinement(
    path: Path, images: Sequence[SegmentedImage], *, aspect: float = 1.0, about: str = ""
) -> Path:
    """Draw a row for each image with instances: the image, the true segmentation, the predicted one at some iterates.

    Arguments as of `draw_segmentation`.
    """
    last = len(images[0].labels) - 1
    steps = [*[step for step in STRIP if step < last][: MOST_COLUMNS - 1], last]
    sheet = _sheet(2 + len(steps), len(images), aspect, lines=2)
    sheet.heading("Segmentation at every iteration", f"{_MATCHED} at the end. Scores in %.", about)
    for row, image in enumerate(images):
        first, second, *cells = _row(sheet, row, 2 + len(steps), aspect, image.name, lines=2)
        _show(first, image.picture, "image", smooth=True)
        _show(second, image.truth, "true")
        for cell, step in zip(cells, steps, strict=True):
            name = f"after {plural(step, 'step')}" if step else "start"
            _show(cell, image.painted(step), f"{name}\n{image.scores(step)}")
    return sheet.save(path)


def _sheet(columns: int, rows: int, aspect: float, *, lines: int = 1) -> Sheet:
    """A sheet for rows of panels with lines of text under each."""
    width = 0.3 + columns * (SIDE * aspect + GAP) + 0.2
    return Sheet(max(width, LEAST_WIDTH), HEAD + rows * _row_height(lines) + 0.1)


def _row_height(lines: int) -> float:
    return SIDE + BETWEEN + LINE * (lines - 1)


def _row(sheet: Sheet, row: int, columns: int, aspect: float, title: str, *, lines: int = 1) -> list[Axes]:
    """The title and the panels of a row."""
    bottom, width = sheet.height - HEAD - row * _row_height(lines) - SIDE, SIDE * aspect
    sheet.note(0.3, bottom + SIDE + 0.12, title, fontsize=10, parse_math=False)
    return [sheet.panel(0.3 + k * (width + GAP), bottom, width, SIDE) for k in range(columns)]


def _show(axes: Axes, picture: np.ndarray, name: str, *, smooth: bool = False, edge: str | None = None) -> None:
    axes.imshow(picture, aspect="auto", interpolation="bicubic" if smooth else "nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=edge or "#cfcfca", linewidth=2.5 if edge else 0.6)
    axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=INK)
