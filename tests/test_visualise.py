"""The figures show positions, scores and errors correctly, cover every corner case, and are written atomically."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid

from setpred.errors import InputError
from setpred.metrics import average_precision
from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.schema import CLEVR, UNCALIBRATED, ElementSchema, categorical, continuous
from setpred.visualise import Descent, Voting, draw_refinement_film, draw_supports, refinement, report, write_report
from setpred.visualise.curves import _envelope
from setpred.visualise.predictions import compare
from setpred.visualise.style import Sheet
from setpred.visualise.supports import support_colours
from setpred.visualise.world import VIEW, as_pictures, cameras_of, on_map, outlines_on_image

WORLD = ["predictions.png", "refinement.gif", "refinement.png"]
FIGURES = [*WORLD, "precision_recall.png", "reliability.png", "confusion.png", "distance_errors.png"]


def sets(schema, images, set_size=5, noise=0.1):
    """Real sets in CLEVR's square, and predictions near them, some of them wrong, missing or extra."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(images, set_size, schema.set_dim, generator=generator)
    for field in schema.continuous:
        target[..., schema.slice(field.name)] = 2 * target[..., schema.slice(field.name)] - 1
    predicted = target + noise * torch.randn(target.shape, generator=generator)
    target[..., -1] = (torch.rand(images, set_size, generator=generator) < 0.7).float()
    predicted[..., -1] = target[..., -1] + 0.4 * torch.randn(images, set_size, generator=generator)
    return predicted, target


def pictures(images, height=32, width=32):
    return np.random.default_rng(0).integers(0, 256, (images, height, width, 3), dtype=np.uint8)


def descent(predicted, steps):
    start = 0.1 * torch.randn(predicted.shape, generator=torch.Generator().manual_seed(1))
    return torch.stack([start.lerp(predicted, step / steps) for step in range(steps + 1)])


def voting_of(iterates, tokens=16):
    """Votes near the last iterate, with random supports."""
    steps, images, set_size, set_dim = iterates.shape
    generator = torch.Generator().manual_seed(0)
    votes = iterates[-1][:, torch.arange(tokens) % set_size]
    votes = votes + 0.1 * torch.randn(images, tokens, set_dim, generator=generator)
    energies = torch.linspace(5, 1, steps)[:, None].expand(steps, images)
    return Voting(votes, torch.rand(images, set_size, tokens, generator=generator), energies)


def objects(*rows):
    """Elements of (x, y, colour, presence), all large metal spheres."""
    same = {"material": "metal", "shape": "sphere", "size": "large"}
    elements = CLEVR.encode([{"coords": (x, y, 0.7), "color": color, **same} for x, y, color, _ in rows])
    elements[: len(rows), -1] = [presence for *_, presence in rows]
    return torch.from_numpy(elements).double()


@pytest.fixture
def skip_drawing(monkeypatch):
    """`skip_drawing(names)` replaces all drawing functions of the report but these; it returns the sizes drawn."""
    drawn = []

    def skip(*kept):
        for name in vars(report).copy():
            if name.startswith("draw_") and name not in kept:
                monkeypatch.setattr(report, name, lambda path, *given, **_: drawn.append(given) or path)
        return drawn

    return skip


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "new"
    predicted, target = sets(CLEVR, 9)
    camera = np.full((9, 3), np.nan)
    camera[1] = NOMINAL_CAMERA.location
    before = dict(mpl.rcParams)
    given = {"images": pictures(2), "predicted": predicted, "target": target}
    paths = write_report(folder, **given, iterates=descent(predicted, 4), camera=camera)
    assert dict(mpl.rcParams) == before
    return folder, paths


def test_all_figures_are_complete(full_report):
    folder, paths = full_report
    assert [path.name for path in paths] == FIGURES
    assert sorted(path.name for path in folder.iterdir()) == sorted(FIGURES)  # no partial file
    for path in paths:
        with Image.open(path) as figure:
            pixels = np.asarray(figure.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert (pixels == pixels[0, 0]).all(-1).mean() < 0.95
        assert len(np.unique(pixels @ (1, 256, 65536))) > 50
    with Image.open(folder / "refinement.gif") as film:  # a frame for each iterate; the first and last stay longer
        assert film.n_frames == 5
        times = [film.seek(number) or film.info["duration"] for number in range(5)]
    assert times[-1] > 2 * times[0] > 2 * times[1] == 2 * times[2] == 2 * times[3]


def test_a_film_has_few_frames_from_the_start_to_the_prediction(tmp_path, monkeypatch):
    drawn, (predicted, target) = [], sets(CLEVR, 1)
    monkeypatch.setattr(refinement, "MOST_FRAMES", 4)
    monkeypatch.setattr(Descent, "draw_set", lambda self, axes, step: drawn.append(self.iterates[step]))
    steps = descent(predicted, 9)[:, 0]
    draw_refinement_film(
        tmp_path / "a.gif", [Descent(pictures(1)[0], steps, target[0], NOMINAL_CAMERA, CLEVR)], about=""
    )
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == len(drawn) == 4
    assert torch.equal(drawn[0], steps[0])
    assert torch.equal(drawn[-1], predicted[0])


def test_figures_depend_neither_on_earlier_ones_nor_on_matplotlibrc(full_report, tmp_path, skip_drawing):
    skip_drawing("draw_precision_recall", "draw_reliability", "draw_confusion", "draw_distance_errors")
    predicted, target = sets(CLEVR, 9)
    with mpl.rc_context({"text.usetex": True, "font.size": 30, "savefig.dpi": 10, "axes.grid": True}):
        write_report(tmp_path, images=pictures(1), predicted=predicted, target=target)
    assert {path.name for path in tmp_path.iterdir()} == set(FIGURES) - set(WORLD)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (full_report[0] / path.name).read_bytes()


def test_supports_are_reproducible_and_need_a_square_grid(tmp_path, skip_drawing):
    skip_drawing("draw_supports")
    predicted, target = sets(CLEVR, 1)
    iterates, messages, drawn = descent(predicted, 3), [], []
    voting = voting_of(iterates)
    given = {"images": pictures(1), "predicted": predicted, "target": target, "iterates": iterates}
    for number, votes in enumerate((voting, voting, voting._replace(supports=voting.supports.flip(2)))):
        paths = write_report(tmp_path / str(number), voting=votes, **given)
        assert [path.name for path in paths] == [*WORLD, "supports.png", *FIGURES[3:]]
        drawn.append(paths[3].read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    paths = write_report(tmp_path / "none", voting=voting_of(iterates, tokens=12), say=messages.append, **given)
    assert [path.name for path in paths] == FIGURES
    assert messages == ["No picture of the supports: 12 tokens are not a square grid."]


def test_tokens_are_row_by_row_in_the_colours_they_support():
    supports = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.125], [0.0, 0.0, 0.0, 0.375]], dtype=torch.float64)
    picture = support_colours(supports / 2, ["#ff0000", "#00ff00", "#0000ff"])  # opacity 1 for the heaviest
    np.testing.assert_allclose(picture[..., 3], [[0.5, 1], [0, 0.5]])
    np.testing.assert_allclose(picture[0, :, :3], [(1, 0, 0), (0, 1, 0)])
    np.testing.assert_allclose(picture[1, 1, :3], (0, 0.25, 0.75))


def test_an_object_has_its_number_over_the_tokens_that_support_it(tmp_path, monkeypatch):
    """Numbers follow the confidence, as in predictions.png."""
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1))
    predicted = objects((0, 0, "red", 0.8), (2, 2, "blue", 0.9))
    supports = torch.zeros(len(predicted), 16, dtype=torch.float64)
    supports[0, 5] = supports[1, 11] = 0.25
    spots = []
    monkeypatch.setattr("setpred.visualise.world.badge", lambda _, at, text, **__: spots.append((text, *at)))
    seen = Voting(target[:1].repeat(1, 16, 1), supports[None], torch.zeros(1, 1))
    drawn = Descent(pictures(1)[0], predicted[None], target, NOMINAL_CAMERA, CLEVR)
    draw_supports(tmp_path / "supports.png", [drawn], seen, about="")
    (first, *one), (second, *two), *_ = spots
    width, height = VIEW[0] / 4, VIEW[1] / 4
    assert (first, second) == ("1", "2")
    assert one == pytest.approx((3.5 * width, 2.5 * height - 26))  # token 11: row 2, column 3
    assert two == pytest.approx((1.5 * width, 1.5 * height - 26))  # token 5: row 1, column 1


SCHEMAS = {
    "flat": ([continuous("at", 2), categorical("kind", "a", "b")], ["pictures"]),
    "numbers": ([continuous("at", 1)], ["pictures", "confusion"]),
    "classes": ([categorical("kind", "a", "b", "c")], ["pictures", "distance"]),
    "bare": ([continuous("coords", 3, scale=3.0)], ["confusion"]),
    "other": ([categorical("shape", "cone", "cube"), CLEVR.field("coords"), categorical("color", "pink", "red")], []),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_figure_that_a_schema_rules_out_is_skipped_with_a_sentence(name, tmp_path):
    fields, left_out = SCHEMAS[name]
    schema = ElementSchema(name, fields, max_objects=5)
    predicted, target = sets(schema, 1)
    messages, given = [], {"images": pictures(1), "predicted": predicted, "target": target, "schema": schema}
    paths = write_report(tmp_path, iterates=predicted[None], say=messages.append, **given)
    assert all(word in text and name in text for word, text in zip(left_out, messages, strict=True))
    missing = {"pictures": WORLD, "confusion": ["confusion.png"], "distance": ["distance_errors.png"]}
    absent = [figure for word in left_out for figure in missing[word]]
    assert [path.name for path in paths] == [figure for figure in FIGURES if figure not in absent]


@pytest.mark.parametrize("case", ["mixed", "far too many", "smaller sets and no objects"])
def test_corner_cases_are_drawn_without_a_warning(case, tmp_path):
    predicted, target = sets(CLEVR, 3, set_size=6)
    if case == "mixed":
        predicted[0, 0] = math.inf
        predicted[0, 1, :3] = -math.inf
        predicted[0, :2, -1] = 1.0
        predicted[1, :, -1] = 0.1  # nothing confident
        target[2] = 0  # no objects
    if case == "far too many":
        predicted, target = predicted[:1].repeat(1, 5, 1), target[:1]
        predicted[..., -1] = 1.0
    if case == "smaller sets and no objects":
        predicted, target = predicted[:1, :2], 0 * target[:1]
    given = {"images": pictures(len(predicted), 20, 30), "predicted": predicted, "target": target}
    assert [path.name for path in write_report(tmp_path, iterates=predicted[None], **given)] == FIGURES


def test_errors_name_the_argument(tmp_path):
    predicted, target = sets(CLEVR, 2)
    good = {"images": pictures(2), "predicted": predicted, "target": target}
    for change, message in (
        ({"images": pictures(2).astype(np.float32)}, "expected uint8 images .*, got float32"),
        ({"images": pictures(3)}, "expected 1 to 2 images, .* got 3"),
        ({"iterates": predicted}, r"expected iterates \[steps \+ 1, m, 5, 19\], got \[2, 5, 19\]"),
        ({"iterates": math.nan * predicted[None]}, "expected iterates without NaN"),
        (
            {"iterates": predicted[None], "voting": voting_of(predicted[None, :, :4])},
            r"expected votes, supports and energies \[\[2, 16, 19\], \[2, 5, 16\], \[1, 2\]\], got .*\[2, 4, 16\]",
        ),
        ({"camera": np.zeros((1, 3))}, r"expected camera \[2, 3\], got \[1, 3\]"),
        ({"predicted": predicted * math.nan}, "NaN in 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "none", **(good | change))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        write_report(tmp_path / "file", **good)


def test_the_text_right_of_the_title_is_cut_to_its_room():
    sheet = Sheet(9, 4)
    sheet.heading("Title", "subtitle", "$_{folder/" * 20 + "图片.h5")  # neither formula nor known glyphs
    name, aside = (text.get_window_extent(sheet.canvas.get_renderer()) for text in (sheet.texts[0], sheet.texts[-1]))
    assert name.x1 < aside.x0
    assert sheet.texts[-1].get_text().endswith("/图片.h5")


def test_images_have_both_layouts_and_unknown_cameras_are_the_nominal_one():
    images = pictures(2, 20, 30)
    assert all((as_pictures(each) == images).all() for each in (images, torch.from_numpy(images).permute(0, 3, 1, 2)))
    known = (7.0, -6.0, 5.0)
    assert cameras_of(torch.tensor([known, (math.nan,) * 3]), 2) == [Camera(known), NOMINAL_CAMERA]
    assert cameras_of(None, 1) == [NOMINAL_CAMERA]


def test_the_map_agrees_with_the_view():
    """Along a line across the view the image's right is the map's; nearer things are lower on both."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        camera = Camera(tuple(NOMINAL_CAMERA.location + generator.uniform(-0.5, 0.5, 3)))
        points = np.append(generator.uniform(-3, 3, (30, 2)), np.zeros((30, 1)), axis=1)
        flat, seen = on_map(points, camera), camera.project(points, *VIEW)
        assert (np.sign(flat[:, 0]) == np.sign(seen[:, 0] - VIEW[0] / 2)).all()
        assert (np.argsort(flat[:, 1]) == np.argsort(-seen[:, 1])).all()
        np.testing.assert_allclose(np.linalg.norm(flat, axis=1), np.linalg.norm(points[:, :2], axis=1))


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder"])
def test_outlines_contain_the_projected_body(shape):
    """The outline's bounding box is that of random points of the body."""
    body = np.random.default_rng(1).uniform(-1, 1, (20_000, 3))
    centre, half = np.array([1.0, -0.5, 0.7]), 0.7
    if shape == "cube":
        body = np.clip(1.5 * body, -1, 1)
    else:
        body = body[np.linalg.norm(body[:, : {"sphere": 3, "cylinder": 2}[shape]], axis=1) < 1]
    seen = NOMINAL_CAMERA.project(centre + half * body, *VIEW)[:, :2]
    outline = np.concatenate(outlines_on_image({"coords": centre, "size": "large", "shape": shape}, NOMINAL_CAMERA))
    np.testing.assert_allclose(outline.min(0), seen.min(0), atol=2.5)
    np.testing.assert_allclose(outline.max(0), seen.max(0), atol=2.5)
    behind = {"coords": 2 * np.array(NOMINAL_CAMERA.location), "size": "large", "shape": shape}
    assert outlines_on_image(behind, NOMINAL_CAMERA) == []


def test_comparison_by_hand():
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1), (-2, 0, "green", 1))
    predicted = objects((2, 2.5, "red", 0.7), (0, 0.25, "red", 0.9), (-2, 0, "green", 0.2))
    found = compare(predicted, target, CLEVR)
    assert [obj["confidence"] for obj in found.predicted] == pytest.approx(
        UNCALIBRATED.confidence([0.9, 0.7])
    )  # 0.2 is not confident
    assert found.partner == [0, 1]
    assert found.distance == pytest.approx([0.25, 0.5])
    assert found.wrong == [[], ["color"]]
    assert [found.real[j]["color"] for j in found.missed] == ["green"]
    assert found.summary == "3 real objects: 1 with all attributes right, 1 with some wrong, 1 missed"
    crowded = compare(predicted.clamp(min=0.6), target[:1], CLEVR)
    assert crowded.partner.count(None) == len(crowded.predicted) - 1
    assert crowded.summary == "1 real object: 1 with all attributes right, 9 extra"


def test_the_area_under_the_drawn_curve_is_the_average_precision(monkeypatch):
    predicted, target = sets(CLEVR, 40, noise=0.2)
    scores = average_precision(predicted, target)
    for threshold, score in scores.items():
        recall, height = _envelope(predicted, target, threshold, CLEVR)
        assert trapezoid(height, recall) == pytest.approx(score, abs=1e-9)
    monkeypatch.setattr("setpred.visualise.curves.MOST_POINTS", 20)
    recall, height = _envelope(predicted, target, math.inf, CLEVR)
    assert len(recall) <= 2 * 20 + 1
    assert trapezoid(height, recall) == pytest.approx(scores[math.inf], abs=0.05)


def test_the_error_of_a_descent_is_that_of_its_last_matching():
    """An iterate that equals the real set in another order than the last one has an error; the last one has none."""
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1))
    steps = torch.stack([target, target[[1, 0, *range(2, 10)]]])
    errors = Descent(pictures(1)[0], steps, target, NOMINAL_CAMERA, CLEVR).errors
    assert errors[1] == 0
    # two elements of ten change: x and y by 2/3, two colour entries by 1
    assert errors[0] == pytest.approx(2 * (2 * (2 / 3) ** 2 / 2 + 2 * 0.5) / 19 / 10)


def test_only_the_first_images_are_drawn(tmp_path, skip_drawing):
    drawn = skip_drawing()
    predicted, target = sets(CLEVR, report.PICTURED + 3, set_size=1)
    for count in (report.PICTURED + 3, 2):
        images = torch.from_numpy(pictures(count, 8, 8)).permute(0, 3, 1, 2)  # the layout of a model's input
        write_report(tmp_path, images=images, predicted=predicted, target=target)
        assert len(drawn[0][0]) == min(count, report.PICTURED)
        drawn.clear()
