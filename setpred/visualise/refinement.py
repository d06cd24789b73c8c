"""The descent made visible: the set at every iteration, as a film and as a strip."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageColor
from torch import Tensor

from setpred.files import write_atomically
from setpred.matching import hungarian, pairwise_smooth_l1
from setpred.rendering.camera import Camera
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.glyphs import draw_filled, draw_outlined
from setpred.visualise.panels import outline_on_image, show_image, show_map
from setpred.visualise.style import (
    CLASS_COLOURS,
    FAINT,
    INK,
    WRONG,
    boxes_for_missing_glyphs,
    heading,
    new_figure,
    save_png,
    styled,
)
from setpred.visualise.world import on_map

STRIP = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # iterations shown in the strip, and always the last
MOST_COLUMNS, MOST_FRAMES = 7, 60
FILM_DPI = 80
FIRST_MS, LAST_MS = 800, 2500
FASTEST_MS, SLOWEST_MS, BETWEEN_MS = 120, 400, 3000  # of a frame between the first and the last, and of all of them
FAINTEST = 0.12  # opacity of an element of no confidence
_TITLE = "How the set is refined"
_ERROR = "Error: smooth L1 distance to the real set, matched as at the end."
_STRIP_NOTE = (
    "Maps seen from above, the camera at the lower edge: real objects outlined, the set filled, fainter where less "
    f"confident. {_ERROR}"
)
_FILM_NOTE = f"The set is drawn fainter where it is less confident; thin lines are the ways its elements took. {_ERROR}"


@dataclass(frozen=True)
class Descent:
    """One example: its image, its iterates `[T + 1, set_size, set_dim]` and its truth `[target_size, set_dim]`."""

    picture: np.ndarray
    iterates: Tensor
    target: Tensor
    camera: Camera
    schema: ElementSchema

    @property
    def steps(self) -> int:
        return len(self.iterates) - 1

    def errors(self) -> np.ndarray:
        """Mean smooth L1 between each iterate and the real set, under the assignment of the last iterate."""
        target = self.target[self.target[:, -1].argsort(descending=True, stable=True)][: self.iterates.shape[1]]
        cost = pairwise_smooth_l1(self.iterates, target.expand(len(self.iterates), *target.shape))
        assignment = hungarian(cost[-1:])[0]
        return cost[:, assignment, range(len(target))].mean(1).numpy()

    def draw_real(self, axes: Axes) -> None:
        for obj in self.schema.decode(self.target[presence_mask(self.target)]):
            draw_outlined(axes, obj, on_map(obj["coords"], self.camera))

    def draw_set(self, axes: Axes, step: int) -> None:
        for number, obj in enumerate(self._elements(step)):
            place = on_map(obj["coords"], self.camera)
            draw_filled(axes, obj, place, opacity=_opacity(obj["confidence"]), zorder=4 + number / 1000)

    def outline_set(self, axes: Axes, step: int) -> None:
        for obj in self._elements(step):
            outline_on_image(axes, obj, self.camera, opacity=_opacity(obj["confidence"]))

    def mark_error(self, axes: Axes, step: int) -> None:
        errors = self.errors()
        axes.plot(errors[: step + 1], color=INK, linewidth=1.8)
        axes.plot(step, errors[step], "o", color=WRONG, markersize=6, clip_on=False, zorder=6)
        axes.text(1, 1.03, f"{errors[step]:.3g}", transform=axes.transAxes, ha="right", fontsize=11)

    def _elements(self, step: int) -> list[dict[str, Any]]:
        """All elements of an iterate, the surest last so that it lies on top."""
        return self.schema.decode(self.iterates[step], threshold=-np.inf)[::-1]

    def draw_trails(self, axes: Axes, step: int) -> None:
        """The ways of the elements that end up confident."""
        centres = on_map(self.schema.values(self.iterates, "coords").numpy(), self.camera)[: step + 1]
        for number in presence_mask(self.iterates[-1]).nonzero()[:, 0].tolist():
            axes.plot(*centres[:, number].T, color=INK, linewidth=0.8, alpha=0.55, zorder=5)


def _opacity(confidence: float) -> float:
    return FAINTEST + (1 - FAINTEST) * confidence


@styled()
def draw_refinement_strip(path: Path, descents: Sequence[Descent], *, about: str) -> Path:
    """For each example a row: its image, then the map at a few iterations, the last one included."""
    last = descents[0].steps
    shown = [*[step for step in STRIP if step < last][: MOST_COLUMNS - 1], last]
    side, gap, foot = 2.55, 0.15, 0.45
    image_width = 1.5 * side
    width = max(0.3 + image_width + (gap + side) * len(shown) + 0.2, 15.0)  # room for the note
    height = 1.15 + (side + foot) * len(descents)
    figure = new_figure(width, height)
    heading(figure, _TITLE, _STRIP_NOTE, about)
    for row, descent in enumerate(descents):
        bottom = height - 1.15 - side * (row + 1) - foot * row
        axes = figure.add_axes((0.3 / width, bottom / height, image_width / width, side / height))
        show_image(axes, descent.picture)
        axes.text(0.5, -0.03, "image", transform=axes.transAxes, ha="center", va="top")
        errors = descent.errors()
        for column, step in enumerate(shown):
            left = 0.3 + image_width + gap + (gap + side) * column
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            show_map(axes, descent.camera, labelled=False)
            descent.draw_real(axes)
            descent.draw_set(axes, step)
            text = f"{_step_name(step)}: error {errors[step]:.3g}"
            axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top")
    return save_png(figure, path)


def _step_name(step: int) -> str:
    return "start" if step == 0 else f"after {step} step{'' if step == 1 else 's'}"


@styled()
def draw_refinement_film(path: Path, descents: Sequence[Descent], *, about: str) -> Path:
    """A GIF: image with the outlined set, map with the ways of the elements, and the error so far."""
    last = descents[0].steps
    steps = sorted(set(np.linspace(0, last, min(last + 1, MOST_FRAMES)).round().astype(int).tolist()))
    frames = _frames(descents, steps, about)
    palette = _palette(frames)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    middle = min(max(BETWEEN_MS // len(frames), FASTEST_MS), SLOWEST_MS)  # a descent of few steps is shown slowly
    times = [FIRST_MS, *[middle] * (len(frames) - 2), LAST_MS][-len(frames) :]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    write_atomically(path, buffer.getvalue())
    return path


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """One palette for all frames, so that nothing flickers, with room for the classes' colours however small."""
    width, height = (side // 2 for side in frames[0].size)
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    sheet = Image.new("RGB", (width, len(chosen) * height))
    for row, frame in enumerate(chosen):
        sheet.paste(frame.resize((width, height), Image.Resampling.NEAREST), (0, row * height))
    colours = [ImageColor.getrgb(colour) for colour in (*CLASS_COLOURS.values(), WRONG)]
    for column, colour in enumerate(colours):
        for shade in range(4):  # full to faint, over the map
            mixed = tuple(round(value + (246 - value) * shade / 4) for value in colour)
            sheet.paste(mixed, (column * 20, shade * 20, column * 20 + 20, shade * 20 + 20))
    return sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)


def _frames(descents: Sequence[Descent], steps: Sequence[int], about: str) -> list[Image.Image]:
    """What stays is drawn once, and on a copy of it for each step what moves."""
    side, gap, head = 3.1, 0.2, 1.1
    width = 0.3 + 1.5 * side + gap + side + 0.75 + side + 0.3
    height = head + (side + 0.4) * len(descents)
    figure = new_figure(width, height, dpi=FILM_DPI)
    name = heading(figure, f"{_TITLE}: step {steps[-1]} of {steps[-1]}", _FILM_NOTE, about)
    name.set_visible(False)
    moving: list[tuple[Axes, Callable[[Axes, int], None]]] = []
    for row, descent in enumerate(descents):
        bottom = height - head - side * (row + 1) - 0.4 * row

        def panel(left: float, size: tuple[float, float], bottom: float = bottom) -> Axes:
            return figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))

        image, middle = panel(0.3, (1.5 * side, side)), panel(0.3 + 1.5 * side + gap, (side, side))
        errors = panel(0.3 + 2.5 * side + gap + 0.75, (side, side - 0.75), bottom + 0.45)
        show_image(image, descent.picture)
        show_map(middle, descent.camera)
        descent.draw_real(middle)
        _show_errors(errors, descent)
        image.set_title("the set, outlined on the image", fontsize=9, pad=4)
        middle.set_title("from above: set filled, real objects outlined", fontsize=9, pad=4)
        moving += [(image, descent.outline_set), (middle, descent.draw_set), (middle, descent.draw_trails)]
        moving += [(errors, descent.mark_error)]
    canvas = figure.canvas
    with boxes_for_missing_glyphs():
        canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    name.set_visible(True)
    frames = []
    for step in steps:
        canvas.restore_region(still)
        name.set_text(f"{_TITLE}: step {step} of {steps[-1]}")
        figure.draw_artist(name)
        for axes, draw in moving:
            before = set(axes.get_children())
            draw(axes, step)
            new = [artist for artist in axes.get_children() if artist not in before]
            for artist in sorted(new, key=lambda artist: artist.zorder):
                axes.draw_artist(artist)
                artist.remove()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return frames


def _show_errors(axes: Axes, descent: Descent) -> None:
    errors = descent.errors()
    axes.plot(errors, color=FAINT, linewidth=1)
    axes.set(xlim=(-0.3, max(len(errors) - 0.7, 1)), xlabel="step", title="error")
    axes.set_ylim(0, 1.08 * float(errors.max()) or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
