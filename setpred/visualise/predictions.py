"""Predicted sets on their images, on a map beside the truth, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from setpred.rendering.camera import Camera
from setpred.schema import ElementSchema
from setpred.visualise.comparison import Comparison, compare
from setpred.visualise.glyphs import draw_filled, draw_outlined
from setpred.visualise.panels import REACH, badge, caption, outline_on_image, show_image, show_map
from setpred.visualise.style import FAINT, INK, WRONG, heading, in_english_order, new_figure, save_png, styled, word
from setpred.visualise.world import half_size, on_map

IMAGE, MAP, LIST, GAP = (6.0, 4.0), 4.0, 6.5, 0.25  # inches
HEAD, ROW, LEGEND = 0.95, 4.5, 1.0
LINE = 0.255  # inches between the lines of a list


@styled()
def draw_predictions(
    path: Path,
    pictures: np.ndarray,
    predicted: Tensor,
    target: Tensor,
    cameras: Sequence[Camera],
    *,
    schema: ElementSchema,
    about: str,
) -> Path:
    """One row for each picture: the image with the predicted objects, the map, the list."""
    width = 0.3 + IMAGE[0] + GAP + MAP + GAP + LIST + 0.2
    height = HEAD + ROW * len(pictures) + LEGEND
    figure = new_figure(width, height)
    heading(
        figure,
        "Predicted objects",
        "Objects predicted with a confidence over 50 %. Left: outlined on the image (how a cube is turned is not "
        "predicted). Middle: seen from above, with the real ones. Right: in words, most confident first.",
        about,
    )
    for row, picture in enumerate(pictures):
        comparison = compare(predicted[row], target[row], schema)
        bottom = height - HEAD - ROW * (row + 1) + 0.1

        def panel(left: float, size: tuple[float, float], bottom: float = bottom) -> Axes:
            return figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))

        figure.text(
            0.3 / width,
            (bottom + IMAGE[1] + 0.17) / height,
            f"Image {row}: {comparison.summary}",
            fontsize=11,
            va="center",
        )
        left, middle = panel(0.3, IMAGE), panel(0.3 + IMAGE[0] + GAP, (MAP, MAP))
        show_image(left, picture)
        _mark_image(left, comparison, cameras[row])
        show_map(middle, cameras[row])
        _mark_map(middle, comparison, cameras[row])
        _write_list(panel(0.3 + IMAGE[0] + GAP + MAP + GAP, (LIST, IMAGE[1])), comparison, schema)
    _legend(figure, width, height, schema)
    return save_png(figure, path)


def _mark_image(axes: Axes, comparison: Comparison, camera: Camera) -> None:
    tops = [outline_on_image(axes, obj, camera) for obj in comparison.predicted]
    for number, top in enumerate(tops):
        if top is not None:
            badge(axes, top, str(number + 1), wrong=_flagged(comparison, number), lift=1)


def _mark_map(axes: Axes, comparison: Comparison, camera: Camera) -> None:
    for obj in comparison.real:
        draw_outlined(axes, obj, on_map(obj["coords"], camera))
    for number, obj in enumerate(comparison.predicted):
        at, half = on_map(obj["coords"], camera), half_size(obj)
        draw_filled(axes, obj, at)
        if (partner := comparison.partner[number]) is not None:
            there = on_map(comparison.real[partner]["coords"], camera)
            axes.plot(*zip(at, there, strict=True), color=INK, linewidth=1.2, zorder=5, marker=".", markersize=3)
        else:
            caption(axes, at - (0, half), "extra", drop=6)
        badge(axes, at + half, str(number + 1), wrong=_flagged(comparison, number))
    for index in comparison.missed:
        obj = comparison.real[index]
        caption(axes, on_map(obj["coords"], camera), "missed", drop=0)
    outside = sum(bool(np.abs(on_map(obj["coords"], camera)).max() > REACH) for obj in comparison.predicted)
    if outside:
        axes.text(
            REACH - 0.2, -REACH + 0.25, f"{outside} off the map", color=WRONG, fontsize=8, ha="right", va="center"
        )


def _flagged(comparison: Comparison, number: int) -> bool:
    return comparison.partner[number] is None or bool(comparison.wrong[number])


def _write_list(axes: Axes, comparison: Comparison, schema: ElementSchema) -> None:
    """The predictions in words, line by line, wrong ones with the truth in brackets."""
    fields = in_english_order(schema)
    lines = 1 + max(len(comparison.predicted), 1) + len(comparison.missed)
    line = min(LINE, IMAGE[1] / (lines + 0.5))
    axes.set(xlim=(0, LIST), ylim=(IMAGE[1], 0))
    axes.set_axis_off()
    starts = [0.4 + 1.13 * k for k in range(len(fields))]
    end = 0.4 + 1.13 * len(fields)
    small = {"fontsize": 8.5, "va": "center"}

    def write(x: float, y: float, text: str, **style: Any) -> None:
        axes.text(x, y, text, **(small | style))

    y = line * 0.7
    for x, field in zip(starts, fields, strict=True):
        write(x, y, word(field.name), color="#666666")
    write(end + 0.72, y, "confidence", color="#666666", ha="right")
    write(end + 1.45, y, "off by", color="#666666", ha="right")
    axes.axhline(y + line * 0.55, color=FAINT, linewidth=0.7, xmax=(end + 1.5) / LIST)
    for number, obj in enumerate(comparison.predicted):
        y += line
        partner = comparison.partner[number]
        write(
            0.25,
            y,
            str(number + 1),
            fontweight="bold",
            ha="right",
            color=WRONG if _flagged(comparison, number) else INK,
        )
        for x, field in zip(starts, fields, strict=True):
            text, wrong = word(obj[field.name]), field.name in comparison.wrong[number]
            if wrong:
                text += f" ({word(comparison.real[partner][field.name])})"
            write(x, y, text, color=WRONG if wrong else INK)
        write(end + 0.72, y, f"{100 * obj['confidence']:.0f} %", ha="right")
        distance = comparison.distance[number]
        write(
            end + 1.45,
            y,
            "extra" if distance is None else f"{distance:.2f}" if distance < 100 else "> 100",
            ha="right",
            color=WRONG if distance is None else INK,
        )
    if not comparison.predicted:
        y += line
        write(0.4, y, "no object has a confidence over 50 %", color=WRONG)
    for index in comparison.missed:
        y += line
        names = " ".join(word(comparison.real[index][field.name]) for field in fields)
        write(0.4, y, f"missed: {names}", color=WRONG)


def _legend(figure: Figure, width: float, height: float, schema: ElementSchema) -> None:
    """What the marks mean, at the lower edge, drawn to the scale of the map."""
    scale = 2 * REACH / MAP  # world units in an inch
    axes = figure.add_axes((0, 0, 1, LEGEND / height))
    axes.set(xlim=(0, width * scale), ylim=(0, LEGEND * scale))
    axes.set_axis_off()
    categorical = {field.name: field.classes for field in schema.categorical}
    base = {name: classes[0] for name, classes in categorical.items()} | {"color": "blue", "size": "small"}
    x, y = 0.0, 0.0

    def start(line: float) -> None:
        nonlocal x, y
        x, y = 0.35 * scale, (LEGEND - line) * scale

    def say(text: str, inches: float) -> None:
        nonlocal x
        axes.text(x, y, text, fontsize=9, va="center")
        x += inches * scale

    def filled(text: str, inches: float, **attributes: str) -> None:
        nonlocal x
        draw_filled(axes, base | attributes, (x + 0.4, y))
        x += 1.0
        say(text, inches)

    start(0.28)
    say("On the map:", 1.0)
    for name in ("shape", "material"):
        for value in categorical.get(name, ()):
            filled(word(value), 0.8, **{name: value})
    for value in categorical.get("color", ()):
        filled(word(value), 0.62, shape="sphere", color=value)
    start(0.74)
    x += 1.0 * scale
    filled("prediction (filled)", 1.4)
    draw_outlined(axes, base, (x + 0.4, y))
    x += 1.1
    say("real object (outline)", 1.65)
    axes.plot((x, x + 0.9), (y, y), color=INK, linewidth=1.2, marker=".", markersize=3)
    x += 1.2
    say("from a prediction to the object it stands for; their distance in units: “off by”", 5.65)
    for wrong, text, inches in (
        (False, "all attributes right", 1.5),
        (True, "extra, or some wrong: predicted (real)", 3),
    ):
        badge(axes, (x, y), "3", wrong=wrong)
        x += 0.4
        say(text, inches)
