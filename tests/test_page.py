"""Pictures and pages of any schema: marks are where the sets are; a page needs nothing else and runs no other code."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.patches import Polygon
from PIL import Image
from test_visualise import pictures, sets

from setpred.evaluation import Predictions, report
from setpred.rendering.camera import NOMINAL_CAMERA
from setpred.schema import CLEVR, ElementSchema, categorical, continuous
from setpred.visualise import Case, draw_marks, has_marks, page, worst_first, write_page
from setpred.visualise.marks import input_picture
from setpred.visualise.predictions import compare
from setpred.visualise.style import Sheet
from setpred.visualise.world import VIEW

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(1)>$title&amp;'
PLACE, KIND = continuous("coords", 2, scale=20.0, offset=20.0), categorical("kind", "a", HOSTILE)
FIELDS = {
    "points": [PLACE, KIND, continuous("radius", 1, scale=3.0)],
    "boxes": [PLACE, continuous("extent", 2, scale=20.0), KIND],
    "turned": [PLACE, continuous("extent", 2, scale=20.0), continuous("angle", 1, scale=90.0), KIND],
    "parts": [PLACE, KIND, continuous("nose", 2, optional=True, scale=20.0, offset=20.0)],
    "plane": [continuous("coords", 2, scale=7.0, offset=1.0), KIND],
    "space": [continuous("coords", 3, scale=7.0, offset=1.0)],
    "classes": [KIND],
}
SCHEMAS = {name: ElementSchema(name, fields, max_objects=5) for name, fields in FIELDS.items()}
every_schema = pytest.mark.parametrize("name", SCHEMAS)


def cases_of(schema, count=3):
    predicted, target = (elements.double() for elements in sets(schema, count))
    named = zip([HOSTILE, "b.png", "c.png"], pictures(count, 24, 24), predicted, target, strict=True)
    return [Case(*case) for case in named]


with_positions = pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "classes"])


@with_positions
def test_marks_are_at_the_decoded_positions(name, tmp_path, monkeypatch):
    schema, drawn = SCHEMAS[name], []
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: drawn.append(sheet))
    cases = cases_of(schema)
    draw_marks(tmp_path / "a.png", cases, schema=schema, subtitle="")
    views = [(0, 1), (0, 2)] if name == "space" else [(0, 1)]
    plain = name in ("plane", "space")
    axes = [panel for panel in drawn[0].axes if plain is False or not panel.images]
    assert len(axes) == len(cases) * len(views)
    for number, case in enumerate(cases):
        for panel, view in zip(axes[number * len(views) :], views, strict=False):
            for elements, marker, style in ((case.target, "o", "-"), (case.predicted, "x", "--")):
                objects = schema.decode(elements)
                if schema.has_boxes:
                    boxes = [
                        box.get_xy()[:4] for box in panel.patches if isinstance(box, Polygon) and box.get_ls() == style
                    ]
                    same(boxes, [schema.corners(obj) for obj in objects])
                else:
                    lines = [np.ravel(line.get_xydata()) for line in panel.lines if line.get_marker() == marker]
                    same(lines, [[obj["coords"][axis] for axis in view] for obj in objects])
    text = " ".join(text.get_text() for panel in drawn[0].axes for text in panel.texts)
    assert "b.png" in text
    for case in cases if schema.categorical else ():
        found = compare(case.predicted, case.target, schema)
        for obj, partner, wrong in zip(found.predicted, found.partner, found.wrong, strict=True):
            assert not wrong or f"kind {obj['kind']} ({found.real[partner]['kind']})" in text


CURVE = ElementSchema("curve", [continuous("coords", 1, scale=12.0, offset=13.0)], max_objects=5)


def vectors(count):
    return np.random.default_rng(0).normal(size=(count, 32)).astype(np.float32)


@pytest.mark.parametrize("shares", [False, True])
def test_marks_in_vectors_are_on_their_curves(shares, tmp_path, monkeypatch):
    drawn, field = [], continuous("coords", 1, scale=0.4, offset=0.5)
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: drawn.append(sheet))
    schema = ElementSchema("shares", [field], max_objects=5) if shares else CURVE
    cases = [case._replace(picture=vector) for case, vector in zip(cases_of(schema), vectors(3), strict=True)]
    draw_marks(tmp_path / "a.png", cases, schema=schema, subtitle="")
    places = np.linspace(0, 1, 32) if shares else np.arange(32)
    assert len(drawn[0].axes) == 3
    for panel, case in zip(drawn[0].axes, cases, strict=True):
        np.testing.assert_allclose(panel.lines[0].get_xydata(), np.stack([places, case.picture], axis=-1))
        for elements, marker in ((case.target, "o"), (case.predicted, "x")):
            found = [np.ravel(line.get_xydata()) for line in panel.lines if line.get_marker() == marker]
            at = [obj["coords"][0] for obj in schema.decode(elements)]
            same(found, [(x, np.interp(x, places, case.picture)) for x in at])


def test_pictures_of_inputs_need_places_in_them():
    def place(size, low, high):
        half = (high - low) / 2
        return ElementSchema("a", [continuous("coords", size, scale=half, offset=low + half)], max_objects=2)

    rows, (vector,) = np.zeros((5, 2)), vectors(1)
    assert input_picture(rows, place(2, 0, 9), vector=False) is rows
    assert input_picture(rows, place(3, 0, 9), vector=False) is None
    assert input_picture(rows[:1], place(1, 0, 1), vector=False) is None  # a set of one element, by chance
    for low, high, there in ((3, 28, True), (0.1, 0.9, True), (-1, 1, False), (400, 700, False), (3, 40, False)):
        found = input_picture(vector[None], place(1, low, high), vector=True)
        assert (found is not None) == has_marks(place(1, low, high), 32) == there
        assert not there or np.array_equal(found, vector)
    assert not has_marks(place(1, 3, 28))


def same(found, wanted):
    """Equal up to the order."""
    assert len(found) == len(wanted)
    if wanted:
        found, wanted = (
            sorted(np.round(np.array(each), 6).reshape(len(wanted), -1).tolist()) for each in (found, wanted)
        )
        np.testing.assert_allclose(found, wanted, atol=2e-6)


@with_positions
def test_the_worst_images_come_first(name):
    schema = SCHEMAS[name]
    predicted, target = sets(schema, 30, noise=0.4)

    def badness(number):
        found = compare(predicted[number], target[number], schema)
        faults = len(found.missed) + found.partner.count(None) + sum(map(bool, found.wrong))
        return faults, max((d for d in found.distance if d is not None), default=0.0)

    scores = [badness(number) for number in worst_first(predicted, target, schema)]
    assert [faults for faults, _ in scores] == sorted((faults for faults, _ in scores), reverse=True)
    for faults in {faults for faults, _ in scores}:
        errors = [round(error, 3) for other, error in scores if other == faults]
        assert errors == sorted(errors, reverse=True)
    assert scores[0][0] > scores[-1][0]


class Page(HTMLParser):
    """The tags, references, texts and scripts of a page; fails at a tag that is not closed."""

    VOID = ("meta", "input", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.texts, self.scripts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.references += [value for key, value in attrs if key in ("src", "href", "action", "srcset", "style")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)


def written(folder, schema, cases, iterates=None, **options):
    predicted, target = (torch.stack([case[k] for case in cases]) for k in (2, 3))
    result = report(Predictions(predicted, target, torch.arange(len(cases))), schema, "dataset")
    iterates = torch.stack([0.5 * predicted, predicted]) if iterates is None else iterates
    given = {"title": HOSTILE, "about": HOSTILE, "result": result, "cases": cases, "iterates": iterates}
    given |= {"cameras": len(cases) * [NOMINAL_CAMERA], "figures": [], "schema": schema, "total": 7} | options
    return write_page(folder / "page.html", **given).read_text()


@every_schema
def test_a_page_is_complete_and_runs_its_own_script_alone(name, tmp_path):
    schema = SCHEMAS[name]
    Image.new("RGB", (9, 9)).save(figure := tmp_path / "a.png")
    text = written(tmp_path, schema, cases_of(schema), figures=[figure])
    found = Page(text)
    assert all(reference.startswith("data:image/png;base64,") for reference in found.references)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    assert sum(HOSTILE in piece for piece in found.texts) >= 3  # title, heading, the name of an image
    assert [tag for tag, _ in found.tags].count("script") == 2  # data and program
    assert not [attributes for _, attributes in found.tags if any(key.startswith("on") for key in attributes)]
    digest = base64.b64encode(hashlib.sha256(found.scripts[-1].encode()).digest()).decode()
    (policy,) = (attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes)
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert len(re.findall("<svg", text)) == 3


@pytest.mark.parametrize("name", ["points", "boxes", "turned", "parts", "clevr"])
def test_the_slider_shows_the_iterates_where_they_are(name, tmp_path):
    schema = SCHEMAS.get(name, CLEVR)
    cases = cases_of(schema)
    predicted = torch.stack([case.predicted for case in cases])
    iterates = torch.stack([predicted + step for step in (0.4, 0.2, 0.0)])
    data = json.loads(Page(written(tmp_path, schema, cases, iterates)).scripts[0])
    assert data["numbers"] == [0, 1, 2]
    for number, case in enumerate(data["cases"]):
        assert len(case["real"]) == len(schema.decode(cases[number].target))
        for step, items in enumerate(case["steps"]):
            for item, element in zip(items, iterates[step, number], strict=True):
                (obj,) = schema.decode(element[None], threshold=-math.inf)
                values = [obj[field.name] for field in schema.fields]
                for field, value, wanted in zip(data["fields"], item["values"], values, strict=True):
                    found = field["classes"][value] if field["classes"] else value
                    exact = field["classes"] or wanted is None  # an absent keypoint
                    assert found == (wanted if exact else pytest.approx(wanted, rel=1e-3))
                assert item["dots"] == [value for value in item["values"][2:] if value is not None and name == "parts"]
                x, y, width, height, turn = item["at"]
                if name == "clevr":
                    place = NOMINAL_CAMERA.project(np.array(obj["coords"]), *VIEW)[:2]
                    assert math.dist((x, y), place) < 0.2 * max(width, height) + 1
                    continue
                assert (x, y) == pytest.approx(obj["coords"], rel=1e-3)
                if name == "turned" and min(obj["extent"]) > 0:
                    assert math.cos(math.radians(turn - obj["angle"][0])) == pytest.approx(1, abs=1e-3)
                if schema.has_boxes:
                    assert (width, height) == pytest.approx(np.maximum(obj["extent"], 0), rel=1e-3, abs=1e-3)
        presence = cases[number].predicted[:, -1]
        order = [k for k in presence.argsort(descending=True, stable=True).tolist() if presence[k] > 0.5]
        expected = compare(cases[number].predicted, cases[number].target, schema).partner
        partners = dict(zip(order, (-1 if partner is None else partner for partner in expected), strict=True))
        assert case["partner"] == [partners.get(k, -1) for k in range(len(presence))]  # absent ones have none


@pytest.mark.parametrize("name", ["plane", "space", "boxes", "curve"])
def test_marks_of_sets_are_where_their_inputs_are_drawn(name, tmp_path):
    """With inputs at the places of the real objects; once in each view; partners are in the same view."""
    schema, cases = {**SCHEMAS, "curve": CURVE}[name], []
    for case in cases_of(schema):
        case.target[:, 0] = (case.target[:, 0] * 12).round() / 12  # in vectors at whole places
        real = schema.decode(case.target)
        points = np.array([obj["coords"] for obj in real]).reshape(-1, schema.field("coords").size)
        cases.append(case._replace(picture=vectors(1)[0] if name == "curve" else points))
    text = written(tmp_path, schema, cases)
    page, views = Page(text), 2 if name == "space" else 1
    paths = [attributes["d"] for tag, attributes in page.tags if tag == "path"]
    drawn = [[tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.e]+),([-\d.e]+)", path)] for path in paths]
    assert len(drawn) == views * len(cases)
    data = json.loads(page.scripts[0])
    for number, (case, found) in enumerate(zip(cases, data["cases"], strict=True)):
        real, count = schema.decode(case.target), len(schema.decode(case.target))
        assert len(found["real"]) == views * count
        for view in range(views):
            marks = [item["at"] for item in found["real"][view * count :][:count]]
            points = drawn[views * number + view]
            if name == "curve":
                assert len(points) == 32
                points = [points[round(obj["coords"][0])] for obj in real]
            np.testing.assert_allclose([at[:2] for at in marks], points, atol=2e-3)
            if name == "boxes":  # in one scale with the points
                apart = np.ptp([at[0] for at in marks]) / np.ptp([obj["coords"][0] for obj in real])
                assert [at[2] for at in marks] == pytest.approx(
                    [apart * max(0, obj["extent"][0]) for obj in real], rel=1e-2
                )
            if name == "curve":
                upwards = [case.picture[round(obj["coords"][0])] for obj in real]
            else:
                upwards = [obj["coords"][1 + view] for obj in real]
            assert np.argsort(upwards).tolist() == np.argsort([-at[1] for at in marks]).tolist()
        size = len(case.predicted)
        for step in found["steps"]:
            assert len(step) == views * size
        for view in range(views):
            pairs = zip(found["partner"][:size], found["partner"][view * size :], strict=False)
            assert all(second == (first if first < 0 else first + view * count) for first, second in pairs)


def test_class_names_stay_inside_their_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: drawn.append(sheet))
    schema = ElementSchema("places", [continuous("coords", 2), categorical("kind", "square", "disc")], max_objects=2)
    real = [{"coords": (x, 0.0), "kind": "disc"} for x in (-1.0, 1.0)]
    target = torch.from_numpy(schema.encode(real))
    predicted = torch.from_numpy(schema.encode([obj | {"kind": "square"} for obj in real]))
    draw_marks(tmp_path / "a.png", [Case("a", None, predicted, target)], schema=schema, subtitle="")
    axes, renderer = drawn[0].axes[0], drawn[0].canvas.get_renderer()
    named = [text.get_window_extent(renderer) for text in axes.texts if "square" in text.get_text()]
    assert len(named) == 2
    assert all(axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1 for extent in named)


def test_a_page_is_small_whatever_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_VALUES", 5_000)
    schema = SCHEMAS["boxes"].with_room(10)
    predicted, target = (elements.double() for elements in sets(schema, 12, set_size=10))
    cases = [
        Case("a", picture, *both) for picture, *both in zip(pictures(12, 400, 400), predicted, target, strict=True)
    ]
    text = written(tmp_path, schema, cases, predicted.expand(300, *predicted.shape))
    pixels = 12 * page.LARGEST_PICTURE**2 * 3
    assert len(text) < 1.4 * pixels + 30 * 5_000 + 20_000  # noise, in base 64, and the numbers
    numbers = json.loads(Page(text).scripts[0])["numbers"]
    assert (numbers[0], numbers[-1], len(numbers)) == (0, 299, 5_000 // predicted.numel())
