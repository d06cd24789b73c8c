"""Predicted sets on their images, on a map with the real set, and in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from setpred.errors import plural
from setpred.metrics import match_by_position, pairwise_distance
from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.schema import UNCALIBRATED, Calibration, ElementSchema
from setpred.sets import presence_mask
from setpred.visualise import world
from setpred.visualise.refinement import Descent
from setpred.visualise.style import FAINT, INK, WRONG, Sheet, in_english_order, styled, word

# in inches
IMAGE, MAP, LIST, GAP = (6.0, 4.0), 4.0, 6.5, 0.25
HEAD, ROW, LEGEND = 0.95, 4.5, 0.6
LINE = 0.255  # between the lines of the list


@dataclass(frozen=True)
class Comparison:
    """One predicted set against the real one. Objects are in the format of `ElementSchema.decode`.

    predicted: most confident first; real: the real objects; partner: for each prediction the index of its matched real
    object, or None (an extra prediction); distance: to the partner, or None; wrong: names of the categorical fields
    that differ from the partner's; missed: indices of the unmatched real objects.
    """

    predicted: list[dict[str, Any]]
    real: list[dict[str, Any]]
    partner: list[int | None]
    distance: list[float | None]
    wrong: list[list[str]]
    missed: list[int]

    def is_wrong(self, number: int) -> bool:
        """Whether a prediction is extra or has a wrong attribute."""
        return self.partner[number] is None or bool(self.wrong[number])

    @property
    def summary(self) -> str:
        """The counts of right, wrong, missed and extra objects as a sentence."""
        extra, wrong = self.partner.count(None), sum(map(bool, self.wrong))
        right = len(self.predicted) - extra - wrong
        counts = ((wrong, "with some wrong"), (len(self.missed), "missed"), (extra, "extra"))
        parts = [f"{right} with all attributes right", *(f"{count} {name}" for count, name in counts if count)]
        return f"{plural(len(self.real), 'real object')}: {', '.join(parts)}"


def compare(
    predicted: Tensor, target: Tensor, schema: ElementSchema, calibration: Calibration = UNCALIBRATED
) -> Comparison:
    """Match the confident predictions (presence over one half) of one image to its real objects by position."""
    rows, truth = (elements[elements[:, -1].argsort(descending=True, stable=True)] for elements in (predicted, target))
    rows, truth = rows[presence_mask(rows)], truth[presence_mask(truth)]  # as `decode` orders them
    guesses, real = schema.decode(rows, calibration=calibration), schema.decode(truth)
    assignment = match_by_position(rows[None], truth[None], schema=schema)[0].tolist()
    distances = pairwise_distance(rows[None], truth[None], schema=schema)[0]
    partner = [assignment.index(i) if i in assignment else None for i in range(len(rows))]
    return Comparison(
        predicted=guesses,
        real=real,
        partner=partner,
        distance=[None if j is None else float(distances[i, j]) for i, j in enumerate(partner)],
        wrong=[
            [] if j is None else [f.name for f in schema.categorical if guess[f.name] != real[j][f.name]]
            for guess, j in zip(guesses, partner, strict=True)
        ],
        missed=[j for j, i in enumerate(assignment) if i < 0],
    )


def worst_first(predicted: Tensor, target: Tensor, schema: ElementSchema) -> list[int]:
    """Order images by missed and extra objects and wrong classes together, then by the largest distance, worst first.

    Args:
        predicted, target: `[images, set_size, set_dim]` and `[images, target_size, set_dim]`.
    """
    real, confident = presence_mask(target), presence_mask(predicted)
    away = torch.cat([predicted[..., :-1].masked_fill(~confident[..., None], torch.inf), predicted[..., -1:]], -1)
    slot = match_by_position(away, target, schema=schema)  # as `compare` does, among confident predictions
    partner = predicted.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, predicted.shape[-1]))
    found = real & (slot >= 0) & presence_mask(partner)
    wrong = torch.zeros_like(found)
    for field in schema.categorical:
        wrong |= schema.values(partner, field.name) != schema.values(target, field.name)
    distance = torch.zeros_like(target[..., 0])
    for field in schema.position:
        distance += (schema.values(partner, field.name) - schema.values(target, field.name)).square().sum(-1)
    extra = confident.sum(1) - found.sum(1)
    faults = ((real & ~found) | (found & wrong)).sum(1) + extra
    error = torch.where(found, distance, 0.0).amax(1).nan_to_num()
    return sorted(range(len(target)), key=lambda k: (int(faults[k]), float(error[k])), reverse=True)


@styled()
def draw_predictions(path: Path, descents: Sequence[Descent], *, about: str) -> Path:
    """Draw a row for each last iterate: the image with the predicted objects, the map, the list."""
    sheet = Sheet(0.3 + IMAGE[0] + GAP + MAP + GAP + LIST + 0.2, HEAD + ROW * len(descents) + LEGEND)
    subtitle = (
        "Predictions with a presence over one half. Left: outlined on the image (cubes have no predicted rotation). "
        "Middle: seen from above, with the real objects. Right: in words, most confident first."
    )
    sheet.heading("Predicted objects", subtitle, about)
    for row, descent in enumerate(descents):
        comparison = compare(descent.iterates[-1], descent.target, descent.schema, descent.calibration)
        bottom = sheet.height - HEAD - ROW * (row + 1) + 0.1
        sheet.note(0.3, bottom + IMAGE[1] + 0.17, f"Image {row}, {comparison.summary}", fontsize=11)
        middle = 0.3 + IMAGE[0] + GAP
        wrong = [comparison.is_wrong(number) for number in range(len(comparison.predicted))]
        _show_image(sheet.panel(0.3, bottom, *IMAGE), descent.picture, comparison.predicted, descent.camera, wrong)
        _show_map(sheet.panel(middle, bottom, MAP, MAP), comparison, descent.camera)
        _write_list(sheet.panel(middle + MAP + GAP, bottom, LIST, IMAGE[1]), comparison, descent.schema)
    _draw_legend(sheet, descents[0].schema)
    return sheet.save(path)


@styled()
def draw_outlined_image(
    path: Path, picture: np.ndarray, objects: Sequence[Mapping[str, Any]], *, schema: ElementSchema, about: str = ""
) -> Path:
    """Draw one image with its predicted objects, outlined for the nominal camera and listed in words.

    Args:
        path: path of the PNG.
        picture: image, uint8 `[H, W, 3]`; any shape shows CLEVR's 3:2 view stretched.
        objects: predictions in the format of `ElementSchema.decode`, with "coords" of three numbers.
        about: small text right of the title.
    """
    sheet = Sheet(0.3 + IMAGE[0] + 0.25 + 3.3, HEAD + IMAGE[1] + 0.25)
    sheet.heading(plural(len(objects), "predicted object"), "Most confident first.", about)
    _show_image(sheet.panel(0.3, 0.25, *IMAGE), picture, objects, NOMINAL_CAMERA, [False] * len(objects))
    line = min(0.3, IMAGE[1] / max(len(objects), 1))
    for number, obj in enumerate(objects):
        words = " ".join(word(obj[field.name]) for field in in_english_order(schema))
        text = f"{number + 1}  {words}, {100 * obj['confidence']:.0f} %"
        y = 0.25 + IMAGE[1] - line * (number + 0.5)
        sheet.note(0.3 + IMAGE[0] + 0.25, y, text, fontsize=min(9.0, 30 * line))
    return sheet.save(path)


def _show_image(
    axes: Axes, picture: np.ndarray, objects: Sequence[Mapping[str, Any]], camera: Camera, wrong: Sequence[bool]
) -> None:
    """Show an image with objects outlined and numbered."""
    world.show_image(axes, picture)
    tops = [world.outline_on_image(axes, obj, camera) for obj in objects]
    for number, top in enumerate(tops):
        if top is not None:
            world.badge(axes, top, str(number + 1), wrong=wrong[number], lift=1)


def _show_map(axes: Axes, comparison: Comparison, camera: Camera) -> None:
    """Show both sets from above, the predictions numbered and connected to their matched objects."""
    world.show_map(axes, camera)
    real = [world.on_map(obj["coords"], camera) for obj in comparison.real]
    places = [world.on_map(obj["coords"], camera) for obj in comparison.predicted]
    for obj, at in zip(comparison.real, real, strict=True):
        world.draw_outlined(axes, obj, at)
    for number, (obj, at) in enumerate(zip(comparison.predicted, places, strict=True)):
        world.draw_filled(axes, obj, at)
        if (partner := comparison.partner[number]) is not None:
            axes.plot(*zip(at, real[partner], strict=True), ".-", color=INK, linewidth=1.2, zorder=5, markersize=3)
        else:
            world.caption(axes, at - (0, world.half_size(obj)), "extra", drop=6)
        world.badge(axes, at + world.half_size(obj), str(number + 1), wrong=comparison.is_wrong(number))
    for index in comparison.missed:
        world.caption(axes, real[index], "missed")
    if outside := sum(bool(np.abs(at).max() > world.REACH) for at in places):
        style = {"color": WRONG, "fontsize": 8, "ha": "right", "va": "center"}
        axes.text(world.REACH - 0.2, -world.REACH + 0.25, f"{outside} off the map", **style)


def _write_list(axes: Axes, comparison: Comparison, schema: ElementSchema) -> None:
    """List the predictions line by line, wrong classes in red with the real ones in brackets."""
    fields = in_english_order(schema)
    columns = [0.4 + 1.13 * k for k in range(len(fields) + 1)]
    right = [columns[-1] + 0.72, columns[-1] + 1.45]  # ends of the columns of numbers
    grey, red, end = {"color": "#666666"}, {"color": WRONG}, {"ha": "right"}
    lines = [[(x, word(field.name), grey) for x, field in zip(columns, fields, strict=False)]]
    lines[0] += [(x, text, grey | end) for x, text in zip(right, ("confidence", "off by"), strict=True)]
    for number, obj in enumerate(comparison.predicted):
        partner, distance = comparison.partner[number], comparison.distance[number]
        line = [(0.25, str(number + 1), end | {"fontweight": "bold"} | (red if comparison.is_wrong(number) else {}))]
        for x, field in zip(columns, fields, strict=False):
            if field.name in comparison.wrong[number]:
                real = word(comparison.real[partner][field.name])
                line.append((x, f"{word(obj[field.name])} ({real})", red))
            else:
                line.append((x, word(obj[field.name]), {}))
        off = "extra" if distance is None else f"{distance:.2f}" if distance < 100 else "> 100"
        line.append((right[0], f"{100 * obj['confidence']:.0f} %", end))
        line.append((right[1], off, end | (red if distance is None else {})))
        lines.append(line)
    if not comparison.predicted:
        lines.append([(0.4, "no object has a presence over one half", red)])
    for index in comparison.missed:
        words = " ".join(word(comparison.real[index][field.name]) for field in fields)
        lines.append([(0.4, f"missed: {words}", red)])
    step = min(LINE, IMAGE[1] / (len(lines) + 0.5))
    axes.set(xlim=(0, LIST), ylim=(IMAGE[1], 0))
    axes.set_axis_off()
    axes.axhline(step * 1.25, color=FAINT, linewidth=0.7, xmax=(right[1] + 0.05) / LIST)
    for number, line in enumerate(lines):
        for x, text, style in line:
            axes.text(x, step * (number + 0.7), text, fontsize=8.5, va="center", **style)


def _draw_legend(sheet: Sheet, schema: ElementSchema) -> None:
    legend = world.Legend(sheet, LEGEND, MAP)
    example = {field.name: field.classes[0] for field in schema.categorical} | {"color": "blue", "size": "small"}
    down = LEGEND / 2
    world.draw_filled(legend.axes, example, legend.at(0.45, down))
    world.draw_filled(legend.axes, example | {"material": "metal"}, legend.at(2.35, down))
    world.draw_outlined(legend.axes, example, legend.at(3.65, down))
    line = zip(legend.at(5.6, down), legend.at(5.94, down), strict=True)
    legend.axes.plot(*line, ".-", color=INK, linewidth=1.2, markersize=3)
    world.badge(legend.axes, legend.at(11.55, down), "3", wrong=False)
    world.badge(legend.axes, legend.at(13.35, down), "3", wrong=True)
    for x, text in (
        (0.68, "prediction (filled)"), (2.58, "of metal"), (3.92, "real object (outline)"),
        (6.06, "from a prediction to its matched object; the distance in units is “off by”"),
        (11.7, "all attributes right"), (13.5, "extra, or some wrong: predicted (real)"),
    ):  # fmt: skip
        legend.write(x, down, text)
