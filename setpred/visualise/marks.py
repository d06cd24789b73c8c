"""Draw predicted and real objects where they are: points and boxes on images, other positions in plain axes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.patheffects import withStroke
from torch import Tensor

from setpred.errors import plural
from setpred.schema import ElementSchema
from setpred.visualise.predictions import Comparison, compare
from setpred.visualise.refinement import STRIP
from setpred.visualise.style import GROUND, INK, Sheet, styled, word

REAL, FOUND, EXTRA = "#2fe05b", "#ffd23e", "#ff4b33"  # of the three kinds of marks; they differ in form, too
PANEL, SMALLER, GAP = 2.6, 1.9, 0.25  # inches, of one panel for each set, and of several
COLUMNS = {1: 4, 2: 3, 3: 2}  # sets in a row, by their panels
ALONE = 4.8  # inches, of a single image
HEAD, FOOT, SCALE = 0.95, 0.62, 0.3  # inches: title, lines under an image, numbers at plain axes
EDGE = [withStroke(linewidth=2.6, foreground="#111111")]  # so that marks are seen on every colour
BEHIND = {"facecolor": "#222222", "alpha": 0.65, "linewidth": 0, "pad": 1.5}  # the text at a mark
LONGEST_NAME = 36  # characters
MOST_STEPS = 6  # in a refinement


class Case(NamedTuple):
    """An input with its predicted set and, if known, its real set; `name` is written under it.

    The picture is an image `[S, S, 3]`, an input set of points `[m, 2 or 3]` in the units of `coords`, a vector `[K]`
    that `coords` are places in, or nothing.
    """

    name: str
    picture: np.ndarray | None
    predicted: Tensor
    target: Tensor | None


def has_marks(schema: ElementSchema, length: int | None = None) -> bool:
    """Whether elements have a position that can be marked: a field "coords" of two or three numbers.

    Args:
        length: of the vectors that are the inputs; then it may be one number, see `vector_places`.
    """
    several = any(field.name == "coords" and field.size in (2, 3) for field in schema.continuous)
    return several or (length is not None and vector_places(schema, length) is not None)


def vector_places(schema: ElementSchema, length: int) -> np.ndarray | None:
    """The places of the numbers of a vector in the units of `coords`, which is one number.

    They are 0, 1, ..., or shares of the length where `coords` are between 0 and 1; None where these are elsewhere.
    """
    field = next((field for field in schema.continuous if field.name == "coords" and field.size == 1), None)
    if field is None or length < 2:
        return None
    low, high = field.offset - field.scale, field.offset + field.scale
    places = np.linspace(0, 1, length) if high <= 1 else np.arange(length, dtype=float)
    return places if low > -0.5 and high < places[-1] + 0.5 else None


def input_picture(elements: np.ndarray, schema: ElementSchema, *, vector: bool) -> np.ndarray | None:
    """The picture of an input set `[m, K]`, see `Case`: points, or the only element as a vector."""
    if vector and vector_places(schema, elements.shape[1]) is not None:
        return elements[0]
    size = elements.shape[1]
    placed = size in (2, 3) and any(field.name == "coords" and field.size == size for field in schema.continuous)
    return elements if placed else None


@styled()
def draw_marks(path: Path, cases: Sequence[Case], *, schema: ElementSchema, subtitle: str, about: str = "") -> Path:
    """Draw sets: rings or boxes where objects are, crosses or boxes where they are predicted.

    A line leads from each prediction to its object, and wrong classes are named. Without targets, class names are
    written at the predictions. Positions that are not pixels of the image are drawn next to it, in their units: two
    numbers in a plane, three from above and from the front. Positions in vectors are drawn on their curves.

    Args:
        cases: all with a real set, or none.
        schema: a schema that `has_marks`.
    """
    known = cases[0].target is not None
    sheet, cells = _cells(len(cases), cases[0], schema)
    sheet.heading("Predictions", subtitle, about)
    for case, cell in zip(cases, cells, strict=True):
        compared = _show(cell, case, case.predicted, schema)
        lines = _summary(compared, schema) if known else [plural(len(compared.predicted), "object")]
        _caption(cell, [case.name, *lines], schema)
    if known:
        _draw_legend(sheet, schema)
    return sheet.save(path)


@styled()
def draw_marked_refinement(
    path: Path, cases: Sequence[Case], iterates: Tensor, *, schema: ElementSchema, about: str = ""
) -> Path:
    """Draw a row for each set: its iterates `[steps + 1, cases, set_size, set_dim]` at a few steps and the last one."""
    if not schema.side:  # the image, if any, is no part of the way
        cases = [case._replace(picture=None) if _has_image_apart(case, schema) else case for case in cases]
    last = len(iterates) - 1
    steps = [*[step for step in STRIP if step < last][: MOST_STEPS - 1], last]
    sheet, cells = _cells(len(steps) * len(cases), cases[0], schema, columns=len(steps))
    sheet.heading("Refinement of the set", "Elements with a confidence over 50 %, matched again at each step.", about)
    for row, case in enumerate(cases):
        for step, cell in zip(steps, cells[row * len(steps) :], strict=False):
            compared = _show(cell, case, iterates[step, row], schema)
            text = f"after {plural(step, 'step')}" if step else f"{case.name}, start"
            _caption(cell, [text, *_summary(compared, schema)], schema)
    _draw_legend(sheet, schema)
    return sheet.save(path)


def _cells(
    count: int, example: Case, schema: ElementSchema, *, columns: int | None = None
) -> tuple[Sheet, list[list[Axes]]]:
    """A sheet with the panels of each set, row by row."""
    panels, curve = _has_image_apart(example, schema) + len(axes_of(schema)), _is_vector(example)
    columns = min(2 if curve else COLUMNS[panels], count) if columns is None else columns
    gap, foot = (GAP, FOOT) if schema.side else (GAP + SCALE, FOOT + SCALE)
    panel = (PANEL if panels == 1 else SMALLER) if count > 1 or curve else ALONE
    width = 2 * panel if curve else panel
    rows, step = -(-count // columns), width + gap
    sheet = Sheet(max(5.6, gap + columns * panels * step), HEAD + rows * (panel + foot) + 0.35)
    corners = (
        (gap + column * panels * step, sheet.height - HEAD - row * (panel + foot) - panel)
        for row, column in (divmod(number, columns) for number in range(count))
    )
    return sheet, [[sheet.panel(x + k * step, y, width, panel) for k in range(panels)] for x, y in corners]


def _has_image_apart(case: Case, schema: ElementSchema) -> bool:
    """Whether an image has a panel for itself: positions are not its pixels."""
    return schema.side is None and case.picture is not None and case.picture.ndim == 3


def _is_vector(case: Case) -> bool:
    return case.picture is not None and case.picture.ndim == 1


def axes_of(schema: ElementSchema) -> list[tuple[int, int]]:
    """The pairs of axes that positions are drawn in: the image or plane; from above and from the front."""
    return [(0, 1), (0, 2)] if schema.field("coords").size == 3 else [(0, 1)]


def _show(cell: Sequence[Axes], case: Case, elements: Tensor, schema: ElementSchema) -> Comparison:
    """Show a set in the panels of its cell; return its comparison with the real one."""
    known, side = case.target is not None, schema.side
    compared = compare(elements, case.target if known else torch.zeros_like(elements), schema)
    points = case.picture if case.picture is not None and case.picture.ndim == 2 else None
    if _is_vector(case):
        compared = on_curve(compared, case.picture, schema)
    elif case.picture is not None and points is None:
        extent = (0, side, side, 0) if side else None
        cell[0].imshow(case.picture, extent=extent, interpolation="nearest")
        cell[0].set(xticks=[], yticks=[])
    for axes in cell:
        axes.spines[:].set_visible(False)
    for axes, view in zip(cell[-len(axes_of(schema)) :], axes_of(schema), strict=True):
        if _is_vector(case):
            _draw_curve(axes, case.picture, schema)
        elif side and points is None:
            axes.set(xlim=(0, side), ylim=(side, 0))
        else:
            _plain(axes, view, schema, points)
        _mark_all(axes, view, compared, schema, known)
    return compared


def on_curve(compared: Comparison, vector: np.ndarray, schema: ElementSchema) -> Comparison:
    """The objects with a second coordinate: the number of the vector at their place."""
    places = vector_places(schema, len(vector))

    def on_it(obj: Mapping[str, Any]) -> dict[str, Any]:
        (place,) = obj["coords"]
        return {**obj, "coords": [place, float(np.interp(place, places, vector))]}

    return replace(compared, predicted=list(map(on_it, compared.predicted)), real=list(map(on_it, compared.real)))


def curve_limits(vector: np.ndarray) -> tuple[float, float]:
    """The least and the largest number of a vector, with some room."""
    room = 0.1 * (float(np.ptp(vector)) or 1.0)
    return float(vector.min()) - room, float(vector.max()) + room


def _draw_curve(axes: Axes, vector: np.ndarray, schema: ElementSchema) -> None:
    places = vector_places(schema, len(vector))
    axes.plot(places, vector, color="#8f9aad", lw=1.2)
    axes.set(xlim=(places[0], places[-1]), ylim=curve_limits(vector), facecolor=GROUND)
    axes.tick_params(labelsize=7, length=2, colors="#555555")


def plain_reach(points: np.ndarray | None, schema: ElementSchema) -> float:
    """The reach of axes, from the offset of `coords`, that hold positions and the points of an input set."""
    field = schema.field("coords")
    further = 0.0 if points is None else float(np.abs(points - field.offset).max(initial=0))
    return max(1.15 * field.scale, 1.05 * further)


def _plain(axes: Axes, view: tuple[int, int], schema: ElementSchema, points: np.ndarray | None) -> None:
    field, reach = schema.field("coords"), plain_reach(points, schema)
    if points is not None:
        axes.plot(*points.T[list(view)], ".", ms=3.5, mec="none", mfc="#8f9aad")
    limits = (field.offset - reach, field.offset + reach)
    axes.set(xlim=limits, ylim=limits, facecolor=GROUND, aspect="equal")
    axes.locator_params(nbins=5)
    axes.tick_params(labelsize=7, length=2, colors="#555555")
    for text, x, y in (("xyz"[view[0]], 0.97, 0.02), ("xyz"[view[1]], 0.02, 0.97)):
        style = {"va": "top" if y > 0.5 else "bottom", "ha": "right" if x > 0.5 else "left", "color": "#555555"}
        axes.text(x, y, text, transform=axes.transAxes, **style)


def _mark_all(axes: Axes, view: tuple[int, int], compared: Comparison, schema: ElementSchema, known: bool) -> None:
    for real in compared.real:
        _mark(axes, view, real, REAL, "o", schema)
        _draw_keypoints(axes, real, REAL, "-", schema)
    for found, partner, wrong in zip(compared.predicted, compared.partner, compared.wrong, strict=True):
        colour = EXTRA if known and (partner is None or wrong) else FOUND
        if partner is not None:
            ends = [found["coords"], compared.real[partner]["coords"]]
            axes.plot(*([end[axis] for end in ends] for axis in view), color=colour, lw=0.9, solid_capstyle="round")
        _mark(axes, view, found, colour, "x", schema)
        _draw_keypoints(axes, found, colour, ":", schema)
        names = [found[field.name] for field in schema.categorical]
        if known:
            names = [f"{word(name)} {found[name]} ({compared.real[partner][name]})" for name in wrong]
        if names:
            at, text = [found["coords"][axis] for axis in view], ("\n" if known else " ").join(names)
            low, high = axes.get_xlim()
            right = at[0] > (low + high) / 2  # there the text is left of the mark, inside the panel
            style = {"fontsize": 8, "color": colour, "bbox": BEHIND, "clip_on": True, "parse_math": False}
            style |= {"ha": "right" if right else "left", "textcoords": "offset points"}
            axes.annotate(text, at, (-5 if right else 5, 4), **style)


def _mark(
    axes: Axes, view: tuple[int, int], obj: Mapping[str, Any], colour: str, marker: str, schema: ElementSchema
) -> None:
    if schema.has_boxes:
        style = {"lw": 1.3, "ls": "-" if marker == "o" else "--", "path_effects": EDGE}
        axes.add_patch(Polygon(schema.corners(obj), fill=False, ec=colour, joinstyle="miter", **style))
    else:
        place = ([obj["coords"][axis]] for axis in view)
        size = 8 if marker == "o" else 5
        axes.plot(*place, marker, ms=size, mfc="none", mec=colour, mew=1.3, path_effects=EDGE)


def _caption(cell: Sequence[Axes], lines: Sequence[str], schema: ElementSchema) -> None:
    name, *others = lines
    name = name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]  # the end is its most specific part
    down = -6 if schema.side else -6 - 72 * SCALE * 0.7
    style = {"fontsize": 8, "va": "top", "color": INK, "xycoords": "axes fraction", "textcoords": "offset points"}
    text = "\n".join([name, *others])
    cell[0].annotate(text, (0, 0), (0, down), annotation_clip=False, parse_math=False, **style)


def _draw_keypoints(axes: Axes, obj: Mapping[str, Any], colour: str, line: str, schema: ElementSchema) -> None:
    """Dots at the keypoints that the object has, and the lines of the skeleton between them."""
    places = {field.name: obj[field.name] for field in schema.keypoints if obj[field.name] is not None}
    for start, end in schema.skeleton:
        if start in places and end in places:
            axes.plot(*zip(places[start], places[end], strict=True), line, color=colour, lw=1.2, path_effects=EDGE)
    if places:
        axes.plot(*zip(*places.values(), strict=True), "o", ms=3.2, mfc=colour, mec="#111111", mew=0.6)


def _summary(compared: Comparison, schema: ElementSchema) -> list[str]:
    """One line of what is found, and one of what is not."""
    found = [distance for distance in compared.distance if distance is not None]
    away = f", {np.mean(found):.2g}{' pixels' if schema.side else ''} away" if found else ""
    wrong = sum(map(bool, compared.wrong))
    counts = ((len(compared.missed), "missed"), (compared.partner.count(None), "extra"), (wrong, "of another class"))
    faults = ", ".join(f"{count} {name}" for count, name in counts if count)
    return [f"{len(found)} of {plural(len(compared.real), 'object')} found{away}", faults]


def _draw_legend(sheet: Sheet, schema: ElementSchema) -> None:
    texts = ("real object", "prediction with its object", "prediction without one, or of another class")
    handles = [
        Patch(fill=False, ec=colour, ls="-" if colour == REAL else "--", label=text)
        if schema.has_boxes
        else Line2D([], [], marker="o" if colour == REAL else "x", mfc="none", mec=colour, ls="", label=text)
        for colour, text in zip((REAL, FOUND, EXTRA), texts, strict=True)
    ]
    style = {"frameon": True, "facecolor": "#555555", "labelcolor": "white", "bbox_to_anchor": (GAP / sheet.width, 0.0)}
    style |= {"borderaxespad": 0.4}
    sheet.legend(handles=handles, loc="lower left", ncols=3, fontsize=8, **style)
