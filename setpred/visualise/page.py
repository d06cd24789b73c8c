"""An evaluation as one page of HTML that needs nothing else: tables, the worst images with their sets, figures."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from setpred.errors import plural
from setpred.files import write_atomically
from setpred.metrics import match_by_position
from setpred.metrics.box_precision import columns
from setpred.rendering.camera import Camera
from setpred.schema import UNCALIBRATED, Calibration, ElementSchema
from setpred.visualise.marks import Case, axes_of, curve_limits, has_marks, plain_reach, vector_places
from setpred.visualise.predictions import compare
from setpred.visualise.style import word
from setpred.visualise.world import VIEW, has_world, outlines_on_image

MOST_VALUES = 100_000  # numbers of iterates in a page: steps are left out beyond
LARGEST_PICTURE = 256  # pixels of a side
PANEL, GAP = 100.0, 6.0  # side of a panel without an image, and between two of them, in units of its SVG
_FAR = 1e4  # place of what is out of sight
_HERE = Path(__file__).parent


def has_places(schema: ElementSchema) -> bool:
    """Whether elements have places on their images."""
    return schema.side is not None or has_world(schema)


class Panel(NamedTuple):
    """Plain axes in an SVG, from `left` on: two numbers of positions between `low` and `high`, or a `curve` (x, y)."""

    axes: tuple[int, int]
    low: Sequence[float]
    high: Sequence[float]
    left: float = 0.0
    width: float = PANEL
    curve: tuple[np.ndarray, np.ndarray] | None = None

    def at(self, points: np.ndarray) -> np.ndarray:
        """Places `[m, 2]` in the SVG of positions `[m, d]`."""
        if self.curve is not None:
            points = np.stack([points[:, 0], np.interp(points[:, 0], *self.curve)], axis=-1)
        share = (points[:, list(self.axes)] - self.low) / np.subtract(self.high, self.low)
        return np.stack([self.left + self.width * share[:, 0], PANEL * (1 - share[:, 1])], axis=-1)

    def drawing(self, points: np.ndarray | None) -> str:
        """The curve, or points, as elements of an SVG, and the gap to the panel at the left."""
        gap = f'<rect class="gap" x="{self.left - GAP:g}" width="{GAP:g}" height="{PANEL:g}"/>' if self.left else ""
        if points is None or not len(points):
            return gap
        kind, joint = ("input", "h0.001M") if self.curve is None else ("input curve", "L")
        places = self.at(points if self.curve is None else self.curve[0][:, None])
        return f'{gap}<path class="{kind}" d="M{joint.join(f"{x:.5g},{y:.5g}" for x, y in places)}h0.001"/>'


def views_of(cases: Sequence[Case], cameras: Sequence[Camera], schema: ElementSchema) -> list[list[Camera | Panel]]:
    """The views that the objects of each input are drawn in: its image, or panels without one; perhaps none."""
    pictures = [case.picture for case in cases]
    if pictures[0] is not None and pictures[0].ndim == 3:
        return [[camera] * has_places(schema) for camera in cameras]
    if pictures[0] is not None and pictures[0].ndim == 1:
        places = vector_places(schema, len(pictures[0]))
        ends = [zip((places[0], places[-1]), curve_limits(vector), strict=True) for vector in pictures]
        curves = [{"curve": (places, vector), "width": 2 * PANEL} for vector in pictures]
        return [[Panel((0, 1), *end, **curve)] for end, curve in zip(ends, curves, strict=True)]
    if not has_marks(schema):
        return [[] for _ in cases]
    reach, middle = max(plain_reach(picture, schema) for picture in pictures), schema.field("coords").offset
    ends = [[middle - reach] * 2, [middle + reach] * 2]
    panels = [Panel(axes, *ends, left=k * (PANEL + GAP)) for k, axes in enumerate(axes_of(schema))]
    return [panels for _ in cases]


def write_page(
    path: Path,
    *,
    title: str,
    about: str,
    result: Mapping[str, Any],
    cases: Sequence[Case],
    iterates: Tensor | None,
    cameras: Sequence[Camera],
    figures: Sequence[Path],
    schema: ElementSchema,
    calibration: Calibration = UNCALIBRATED,
    total: int,
) -> Path:
    """Write the page, atomically. Text is escaped, and the page may load nothing and run no other script.

    Where elements have places on the images, or the inputs are sets or vectors with positions, a slider shows the
    iterates, and marks name their attributes and errors.

    Args:
        result: what `setpred.evaluation.report` returns.
        cases: inputs, worst first, with their names and real sets.
        iterates: `[steps + 1, cases, set_size, set_dim]`; None without cases.
        cameras: of each image, for sets in CLEVR's world.
        figures: images to embed.
        total: number of images of the evaluation.
    """
    views = views_of(cases, cameras, schema) if cases else []
    placed = list(zip(cases, views, strict=True)) if any(views) else []
    panel = placed[0][1][-1] if placed and isinstance(placed[0][1][-1], Panel) else None
    view = [panel.left + panel.width, PANEL] if panel else VIEW if has_world(schema) else [schema.side] * 2
    iterates = torch.nan_to_num(iterates, nan=_FAR) if placed else None
    steps = _steps(iterates) if placed else []
    units = {f.name: f.unit or ("pixels" if f.name in schema.in_pixels else "") for f in schema.fields}
    data = {
        "view": view,
        "boxes": schema.has_boxes and not has_world(schema),
        "numbers": steps,
        "fields": [
            {"name": word(f.name), "unit": units[f.name], "classes": f.classes or None, "period": f.period}
            for f in schema.fields
        ],
        "cases": [_case(*each, iterates[steps, k], schema, calibration) for k, each in enumerate(placed)],
    }
    script = (_HERE / "page.js").read_text()
    page = Template((_HERE / "page.html").read_text()).substitute(
        title=escape(title),
        about=escape(about),
        tables=_tables(result),
        cases=_cards(cases, views, data, schema, total) if cases else "",
        figures="".join(["<h2>Figures</h2><div class=figures>", *map(_figure, figures), "</div>"]) if figures else "",
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # no end of the script within a text
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomically(path, page)
    return path


def _steps(iterates: Tensor) -> list[int]:
    """Steps to show: all, or as many as the page may hold, with the first and the last."""
    last = len(iterates) - 1
    most = max(2, MOST_VALUES // max(iterates[0].numel(), 1))
    return sorted(set(np.linspace(0, last, min(last + 1, most)).round().astype(int).tolist()))


def _case(
    case: Case, views: Sequence[Camera | Panel], iterates: Tensor, schema: ElementSchema, calibration: Calibration
) -> dict[str, Any]:
    """The real set and the iterates `[steps, set_size, set_dim]`, as the script draws them: once in each view."""

    def item(element: Tensor, view: Camera | Panel) -> dict[str, Any]:
        obj = schema.decode(element[None], threshold=0, calibration=calibration)[0]
        values = [
            f.classes.index(obj[f.name]) if f.categorical else obj[f.name] and [_short(v) for v in obj[f.name]]
            for f in schema.fields
        ]
        dots = [[_short(v) for v in obj[f.name]] for f in schema.keypoints if obj[f.name]] if schema.side else []
        kept = {"confidence": _short(obj["confidence"]), "present": bool(element[-1] > 0.5)}
        return {"at": _place(obj, view, schema), "dots": dots, "values": values} | kept

    real = case.target[case.target[:, -1] > 0.5]
    rows, partner = iterates[-1], [-1] * iterates.shape[1]
    present = (rows[:, -1] > 0.5).nonzero().flatten().tolist()  # absent ones would take objects from these
    for number, place in enumerate(match_by_position(rows[None, present], real[None], schema=schema)[0].tolist()):
        if place >= 0:
            partner[present[place]] = number
    return {
        "real": [item(element, view) for view in views for element in real],
        "steps": [[item(element, view) for view in views for element in elements] for elements in iterates],
        "partner": [at if at < 0 else k * len(real) + at for k in range(len(views)) for at in partner],
    }


def _place(obj: Mapping[str, Any], view: Camera | Panel, schema: ElementSchema) -> list[float]:
    """Centre, width, height and turn in degrees of a mark, in the units of the view."""
    if has_world(schema) and not isinstance(view, Panel):
        outline = np.concatenate([*outlines_on_image(obj, view), np.empty((0, 2))])
        if not len(outline):
            return [-_FAR, -_FAR, 0, 0, 0]
        low, high = outline.min(0), outline.max(0)
        return [_short(v) for v in (*(low + high) / 2, *(high - low), 0)]
    corners = schema.corners(obj) if schema.has_boxes else np.array([obj["coords"]])
    corners = view.at(corners) if isinstance(view, Panel) else corners
    if not schema.has_boxes:
        return [*map(_short, corners[0]), 0, 0, 0]
    along = corners[1] - corners[0]
    turn = math.degrees(math.atan2(along[1], along[0]))
    return [_short(v) for v in (*corners.mean(0), math.hypot(*along), math.dist(corners[1], corners[2]), turn)]


def _short(number: float) -> float:
    return float(f"{min(max(number, -_FAR), _FAR):.5g}")


def _tables(result: Mapping[str, Any]) -> str:
    details = result["attributes"]
    shares = {"all classes": details["all_attributes"], **details["accuracy"]} if details["accuracy"] else {}
    shares |= {"presence": details["presence_accuracy"], "number of objects": details["count_exact"]}
    tables = [_table("Average precision in %, by the largest distance", {"": _percent(result["ap"])})]
    if boxes := result.get("box_ap"):
        rows = {"all classes": boxes} | (boxes["classes"] if len(boxes["classes"]) > 1 else {})
        scores = {name: _percent({key: row[key] for key in columns(boxes)}) for name, row in rows.items()}
        tables.append(_table("Average precision and recall of boxes in %, by their overlap as COCO does", scores))
    tables.append(_table("Right, in %", {"": _percent({word(name): share for name, share in shares.items()})}))
    errors = {"distance": details["distance"] | {"unit": details["unit"]}} | details["errors"]
    rows = {
        f"{word(name)} ({row['unit']})" if row["unit"] else word(name): {
            key: f"{row[key]:.3g}" for key in ("mean", "median", "p90")
        }
        for name, row in errors.items()
        if not math.isnan(row["mean"])
    }
    if rows and details["axis_errors"]:
        tables.append(_table("Errors", rows))
    return f'<div class="tables">{"".join(tables)}</div>'


def _percent(shares: Mapping[str, float]) -> dict[str, str]:
    return {name: "none" if math.isnan(share) else f"{100 * share:.1f}" for name, share in shares.items()}


def _table(caption: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a column for each key of the rows, whose names come first unless empty."""
    named = any(rows)

    def line(name: str, cells: Iterable[str], tag: str) -> str:
        first = f"<th>{escape(name)}</th>" if named else ""
        return f"<tr>{first}{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = line("", next(iter(rows.values())), "th")
    body = "".join(line(name, cells.values(), "td") for name, cells in rows.items())
    return f"<table><caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


_BAR = """<div class="bar"><label>Refinement <input type="range" id="slider" min="0" max="{0}" value="{0}"></label>
<span id="step"></span><span class="key"><i></i>real object<i class="found"></i>prediction
<i class="wrong"></i>extra, or of another class</span></div>"""


def _cards(
    cases: Sequence[Case], views: Sequence[Any], data: Mapping[str, Any], schema: ElementSchema, total: int
) -> str:
    noun = "image" if cases[0].picture is not None and cases[0].picture.ndim == 3 else "example"
    few = f"The {len(cases)} worst of {plural(total, noun)}" if len(cases) < total else plural(total, noun)
    about = f"{few}, by missed, extra and wrong objects, then by distance."
    if data["cases"]:
        about += " Point at a mark for its attributes."
    if (plain := views[0]) and isinstance(plain[0], Panel):
        about += f" Positions are from {plain[0].low[0]:.3g} to {plain[0].high[0]:.3g}"
        about += "; left x and y, right x and z." if len(plain) > 1 else "."
    cards = "".join(_card(case, each, data, schema) for case, each in zip(cases, views, strict=True))
    bar = _BAR.format(len(data["numbers"]) - 1) if data["cases"] else ""
    return f'<h2>Worst {noun}s</h2><p class="about">{about}</p>{bar}<div class="cases">{cards}</div>'


def _card(case: Case, views: Sequence[Camera | Panel], data: Mapping[str, Any], schema: ElementSchema) -> str:
    compared = compare(case.predicted, case.target, schema)
    shown, lines = "", [compared.summary]
    if views or case.picture is not None:
        width, height = data["view"] if data["cases"] else case.picture.shape[1::-1]
        if views and isinstance(views[0], Panel):
            drawn = "".join(view.drawing(case.picture) for view in views)
        else:
            size = f'width="{width:g}" height="{height:g}"'
            drawn = f'<image href="{_picture(case.picture)}" {size} preserveAspectRatio="none"/>'
        shown = f'<svg viewBox="0 0 {width:g} {height:g}">{drawn}</svg>'
    if not data["cases"]:
        for name, objects in (("predicted", compared.predicted), ("real", compared.real)):
            texts = (" ".join(str(obj[field.name]) for field in schema.categorical) for obj in objects)
            lines += [f"{name}: {', '.join(sorted(texts))}"] if schema.categorical else []
    spans = "".join(f"<span>{escape(line)}</span>" for line in lines)
    wide = " class=wide" if data["cases"] and data["view"][0] > 1.9 * data["view"][1] else ""
    return f"<figure{wide}>{shown}<figcaption>{escape(case.name)}{spans}</figcaption></figure>"


def _picture(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    image.save(buffer := io.BytesIO(), "PNG")
    return _uri(buffer.getvalue())


def _figure(path: Path) -> str:
    return f'<img alt="{escape(path.stem)}" src="{_uri(path.read_bytes())}">'


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
