"""Which class is taken for which, attribute by attribute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from setpred.schema import ElementSchema
from setpred.visualise.style import INK, heading, in_english_order, new_figure, plural, save_png, styled, word

CELL, NAMES, ABOVE, GAP, HEAD = 0.62, 1.0, 1.15, 0.35, 1.05  # inches
_PER_LINE = 4


@styled()
def draw_confusion(path: Path, report: Mapping[str, Any], *, schema: ElementSchema, about: str) -> Path:
    """A matrix for each categorical field, its rows normalised; `report` is that of `attribute_report`."""
    fields = in_english_order(schema)
    fields.sort(key=lambda field: -field.size)
    # the largest matrix alone at the left, the others stacked beside it, as far as its height goes
    columns: list[list[Any]] = []
    room = 0.0
    for field in fields:
        need = ABOVE + CELL * field.size
        if not columns or need > room + 1e-9:
            columns.append([])
            room = max(ABOVE + CELL * fields[0].size, need)
        columns[-1].append(field)
        room -= need + GAP
    widths = [NAMES + CELL * max(max(field.size for field in column), 3) + GAP for column in columns]
    width = max(0.3 + sum(widths), 7.5)
    height = HEAD + ABOVE + CELL * fields[0].size + 0.35
    figure = new_figure(width, height)
    matched = int(np.sum(report["confusion"][fields[0].name]))
    heading(
        figure,
        "Which class is taken for which",
        f"{plural(matched, 'real object')} and the predictions that stand for them, paired one to one by place alone. "
        "Share of the row, and how many.",
        about,
    )
    x = 0.3
    for column, column_width in zip(columns, widths, strict=True):
        y = HEAD
        for field in column:
            side = CELL * field.size
            box = (x + NAMES, height - y - ABOVE - side, side, side)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            names = [word(name) for name in field.classes]
            _matrix(axes, np.array(report["confusion"][field.name]), names)
            share = report["accuracy"][field.name]
            axes.set_title(
                f"{word(field.name)}: " + ("no object" if np.isnan(share) else f"{100 * share:.1f} % right"),
                fontweight="bold", x=0, y=1 + 0.68 / side, pad=0,
            )  # fmt: skip
            y += ABOVE + side + GAP
        x += column_width
    return save_png(figure, path)


def _matrix(axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.15)  # the root shows rare mistakes
    for row, column in np.ndindex(*counts.shape):
        if not totals[row]:
            text, colour = "none", "#b5b5b5"
        else:
            text = (
                f"{_per_cent(counts[row, column], totals[row, 0])}\n{counts[row, column]:,}"
                if counts[row, column]
                else "0"
            )
            colour = "white" if shares[row, column] > 0.45 else INK if counts[row, column] else "#b5b5b5"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour, linespacing=1.25)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(ticks, names, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("predicted", fontsize=9, color="#666666", labelpad=4)
    axes.set_ylabel("real", fontsize=9, color="#666666")
    axes.xaxis.set_label_position("bottom")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _per_cent(part: int, whole: int) -> str:
    """Rounded, but neither 0 nor 100 unless it is so."""
    rounded = f"{100 * part / whole:.0f} %"
    if part < whole and rounded == "100 %":
        return "> 99 %"
    return "< 1 %" if rounded == "0 %" and part else rounded
