"""Confusion matrices of the categorical fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from setpred.errors import plural
from setpred.schema import ElementSchema
from setpred.visualise.style import INK, Sheet, in_english_order, styled, word

CELL, NAMES, ABOVE, GAP, HEAD = 0.62, 1.0, 1.15, 0.35, 0.8  # inches
_FAINT = "#b5b5b5"


@styled()
def draw_confusion(path: Path, report: Mapping[str, Any], *, schema: ElementSchema, about: str) -> Path:
    """Draw a matrix with normalised rows for each categorical field; `report` is from `attribute_report`."""
    fields = sorted(in_english_order(schema), key=lambda field: -field.size)
    # the largest matrix alone at the left, the others in columns of at most its height
    columns: list[list[Any]] = []
    room, largest = 0.0, ABOVE + CELL * fields[0].size
    for field in fields:
        need = ABOVE + CELL * field.size
        if need > room + 1e-9:
            columns.append([])
            room = largest
        columns[-1].append(field)
        room -= need + GAP
    widths = [NAMES + CELL * max(3, *(field.size for field in column)) + GAP for column in columns]
    sheet = Sheet(max(0.3 + sum(widths), 9.2), HEAD + largest + 0.35)
    matched = int(np.sum(report["confusion"][fields[0].name]))
    subtitle = (
        f"{plural(matched, 'real object')}, matched one to one to predictions by position alone. Each cell: share of "
        "the row, and count."
    )
    sheet.heading("Confusion of classes", subtitle, about)
    x = 0.3
    for column, width in zip(columns, widths, strict=True):
        y = sheet.height - HEAD
        for field in column:
            side = CELL * field.size
            y -= ABOVE + side
            axes = sheet.panel(x + NAMES, y, side, side)
            _draw_matrix(axes, np.array(report["confusion"][field.name]), [word(name) for name in field.classes])
            share = report["accuracy"][field.name]
            right = "no object" if np.isnan(share) else f"{100 * share:.1f} % right"
            axes.set_title(f"{word(field.name)}: {right}", fontweight="bold", x=0, y=1 + 0.68 / side, pad=0)
            y -= GAP
        x += width
    return sheet.save(path)


def _draw_matrix(axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.15)  # the root makes rare mistakes visible
    for (row, column), count in np.ndenumerate(counts):
        text, colour = "0" if totals[row] else "none", _FAINT
        if count:
            text = f"{_per_cent(count, totals[row])}\n{count:,}"
            colour = "white" if shares[row, column] > 0.45 else INK
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
    edges = np.arange(-0.5, len(names))
    axes.hlines(edges, *edges[[0, -1]], color="white", linewidth=1.5)
    axes.vlines(edges, *edges[[0, -1]], color="white", linewidth=1.5)


def _per_cent(part: int, total: int) -> str:
    """Round to whole per cent, but to 0 or 100 only if exact."""
    rounded = f"{100 * part / total:.0f} %"
    if part < total and rounded == "100 %":
        return "> 99 %"
    return "< 1 %" if rounded == "0 %" and part else rounded
