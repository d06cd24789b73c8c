"""The set at every iteration of its refinement, as a film and as a strip."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from setpred.errors import plural
from setpred.files import write_atomically
from setpred.matching import hungarian, pairwise_smooth_l1
from setpred.rendering.camera import Camera
from setpred.schema import UNCALIBRATED, Calibration, ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import FAINT, INK, WRONG, Sheet, boxes_for_missing_glyphs, styled
from setpred.visualise.world import draw_filled, draw_outlined, on_map, outline_on_image, show_image, show_map

STRIP = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # iterations in the strip, before the last one
MOST_COLUMNS, MOST_FRAMES = 7, 60
FILM_DPI = 80
FIRST_MS, LAST_MS = 800, 2500
FASTEST_MS, SLOWEST_MS, BETWEEN_MS = 120, 400, 3000  # per frame between the first and the last, and in total
FAINTEST = 0.12  # opacity of an element without confidence
_TITLE = "Refinement of the set"
_NOTE = (
    "Elements are fainter where less confident; thin lines are their paths. Error: smooth L1 distance to the real set, "
    "matched as at the end."
)


@dataclass(frozen=True)
class Descent:
    """One example: its image, its iterates `[T + 1, set_size, set_dim]` and its real set `[target_size, set_dim]`."""

    picture: np.ndarray
    iterates: Tensor
    target: Tensor
    camera: Camera
    schema: ElementSchema
    calibration: Calibration = UNCALIBRATED

    @property
    def steps(self) -> int:
        """Number of steps from the start to the last iterate."""
        return len(self.iterates) - 1

    @cached_property
    def errors(self) -> np.ndarray:
        """Mean smooth L1 between each iterate and the real set, under the assignment of the last iterate."""
        target = self.target[self.target[:, -1].argsort(descending=True, stable=True)][: self.iterates.shape[1]]
        cost = pairwise_smooth_l1(self.iterates, target.expand(len(self.iterates), *target.shape))
        assignment = hungarian(cost[-1:])[0]
        return cost[:, assignment, range(len(target))].mean(1).numpy()

    def draw_real(self, axes: Axes) -> None:
        """Outline the real objects on the map."""
        for obj in self.schema.decode(self.target):
            draw_outlined(axes, obj, on_map(obj["coords"], self.camera))

    def _elements(self, step: int) -> Iterator[tuple[dict[str, Any], float]]:
        """All elements of an iterate with their opacities, the most confident last, so on top."""
        for obj in reversed(self.schema.decode(self.iterates[step], threshold=0, calibration=self.calibration)):
            yield obj, FAINTEST + (1 - FAINTEST) * obj["confidence"]

    def outline_set(self, axes: Axes, step: int) -> None:
        """Outline an iterate on the image."""
        for obj, opacity in self._elements(step):
            outline_on_image(axes, obj, self.camera, opacity=opacity)

    def draw_set(self, axes: Axes, step: int) -> None:
        """Draw an iterate on the map, with the paths of the elements that end up confident."""
        for number, (obj, opacity) in enumerate(self._elements(step)):
            draw_filled(axes, obj, on_map(obj["coords"], self.camera), opacity=opacity, zorder=4 + number / 1000)
        centres = on_map(self.schema.values(self.iterates, "coords").numpy(), self.camera)[: step + 1]
        for path in centres[:, presence_mask(self.iterates[-1]).numpy()].swapaxes(0, 1):
            axes.plot(*path.T, color=INK, linewidth=0.8, alpha=0.55, zorder=5)

    def mark_error(self, axes: Axes, step: int) -> None:
        """Plot the error up to a step."""
        axes.plot(self.errors[: step + 1], color=INK, linewidth=1.8)
        axes.plot(step, self.errors[step], "o", color=WRONG, markersize=6, clip_on=False, zorder=6)
        text = f"step {step} of {self.steps}: {self.errors[step]:.3g}"
        axes.text(1, 1.03, text, transform=axes.transAxes, ha="right", fontsize=11)


@styled()
def draw_refinement_strip(path: Path, descents: Sequence[Descent], *, about: str) -> Path:
    """Draw a row for each example: its image, then the map at a few iterations and the last one."""
    last = descents[0].steps
    shown = [*[step for step in STRIP if step < last][: MOST_COLUMNS - 1], last]
    side, gap, foot, head = 2.55, 0.15, 0.45, 1.15  # inches
    start = 0.3 + 1.5 * side + gap
    height = head + (side + foot) * len(descents)
    sheet = Sheet(max(start + (gap + side) * len(shown) + 0.05, 16.2), height)  # room for the subtitle
    subtitle = f"Maps seen from above, the camera at the lower edge: real objects outlined, the set filled. {_NOTE}"
    sheet.heading(_TITLE, subtitle, about)
    below = {"ha": "center", "va": "top"}
    for row, descent in enumerate(descents):
        bottom = height - head - side * (row + 1) - foot * row
        axes = sheet.panel(0.3, bottom, 1.5 * side, side)
        show_image(axes, descent.picture)
        axes.text(0.5, -0.03, "image", transform=axes.transAxes, **below)
        for column, step in enumerate(shown):
            axes = sheet.panel(start + (gap + side) * column, bottom, side, side)
            show_map(axes, descent.camera, labelled=False)
            descent.draw_real(axes)
            descent.draw_set(axes, step)
            text = f"after {plural(step, 'step')}" if step else "start"
            axes.text(0.5, -0.03, f"{text}: error {descent.errors[step]:.3g}", transform=axes.transAxes, **below)
    return sheet.save(path)


@styled()
def draw_refinement_film(path: Path, descents: Sequence[Descent], *, about: str) -> Path:
    """Draw a GIF: the image with the outlined set, the map with the paths of the elements, and the error."""
    last = descents[0].steps
    steps = sorted(set(np.linspace(0, last, min(last + 1, MOST_FRAMES)).round().astype(int).tolist()))
    frames = _frames(descents, steps, about)
    # one palette for all frames, so that nothing flickers
    palette = frames[-1].quantize(method=Image.Quantize.FASTOCTREE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    middle = min(max(BETWEEN_MS // len(frames), FASTEST_MS), SLOWEST_MS)
    times = [FIRST_MS, *[middle] * (len(frames) - 2), LAST_MS][-len(frames) :]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    write_atomically(path, buffer.getvalue())
    return path


def _frames(descents: Sequence[Descent], steps: Sequence[int], about: str) -> list[Image.Image]:
    """Draw the parts that stay once, and the moving parts over a copy of them at each step."""
    side, gap, foot, head = 3.1, 0.2, 0.4, 1.1  # inches
    sheet = Sheet(0.3 + 2.5 * side + gap + 0.75 + side + 0.3, head + (side + foot) * len(descents), dpi=FILM_DPI)
    sheet.heading(_TITLE, _NOTE, about)
    moving: list[tuple[Axes, Callable[[Axes, int], None]]] = []
    for row, descent in enumerate(descents):
        bottom = sheet.height - head - side * (row + 1) - foot * row
        image = sheet.panel(0.3, bottom, 1.5 * side, side)
        show_image(image, descent.picture)
        image.set_title("the set, outlined on the image", fontsize=9, pad=4)
        above = sheet.panel(0.3 + 1.5 * side + gap, bottom, side, side)
        show_map(above, descent.camera)
        descent.draw_real(above)
        above.set_title("from above: set filled, real objects outlined", fontsize=9, pad=4)
        errors = sheet.panel(0.3 + 2.5 * side + gap + 0.75, bottom + 0.45, side, side - 0.75)
        errors.plot(descent.errors, color=FAINT, linewidth=1)
        errors.set(xlim=(-0.3, max(descent.steps + 0.3, 1)), xlabel="step", title="error")
        errors.set_ylim(0, 1.08 * float(descent.errors.max()) or 1.0)
        errors.xaxis.get_major_locator().set_params(integer=True)
        moving += [(image, descent.outline_set), (above, descent.draw_set), (errors, descent.mark_error)]
    with boxes_for_missing_glyphs():
        sheet.canvas.draw()
    still = sheet.canvas.copy_from_bbox(sheet.bbox)
    frames = []
    for step in steps:
        sheet.canvas.restore_region(still)
        for axes, draw in moving:
            before = set(axes.get_children())
            draw(axes, step)
            new = [artist for artist in axes.get_children() if artist not in before]
            for artist in sorted(new, key=lambda artist: artist.zorder):
                axes.draw_artist(artist)
                artist.remove()
        frames.append(Image.fromarray(np.asarray(sheet.canvas.buffer_rgba())).convert("RGB"))
    return frames
