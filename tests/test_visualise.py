"""The figures: what they show lies where it should, they hold in every corner, and no file is ever half written."""

import itertools
import json
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
from setpred.schema import CLEVR, ElementSchema, categorical, continuous
from setpred.visualise import Descent, Voting, draw_supports, report, write_report
from setpred.visualise.comparison import compare
from setpred.visualise.curves import _envelope
from setpred.visualise.style import heading, new_figure
from setpred.visualise.supports import support_colours
from setpred.visualise.world import VIEW, as_pictures, cameras_of, on_map, outlines_on_image

FIGURES = ["predictions.png", "refinement.gif", "refinement.png", "precision_recall.png", "confusion.png"]
FIGURES += ["distance_errors.png"]


def sets(schema, images, set_size=5, seed=0, noise=0.1, present=0.7):
    """Real sets in CLEVR's square, and predictions near them, some of them wrong, missing or extra."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(images, set_size, schema.set_dim, generator=generator)
    for field in schema.continuous:
        target[..., schema.slice(field.name)] = 2 * target[..., schema.slice(field.name)] - 1
    predicted = target + noise * torch.randn(target.shape, generator=generator)
    target[..., -1] = (torch.rand(images, set_size, generator=generator) < present).float()
    predicted[..., -1] = target[..., -1] + 0.4 * torch.randn(images, set_size, generator=generator)
    return predicted, target


def pictures(images, height=32, width=32):
    return np.random.default_rng(0).integers(0, 256, (images, height, width, 3), dtype=np.uint8)


def descent(predicted, steps):
    start = 0.1 * torch.randn(predicted.shape, generator=torch.Generator().manual_seed(1))
    return torch.stack([start.lerp(predicted, step / steps) for step in range(steps + 1)])


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "new"
    predicted, target = sets(CLEVR, 9)
    camera = np.full((9, 3), np.nan)
    camera[1] = NOMINAL_CAMERA.location
    before = dict(mpl.rcParams)
    paths = write_report(
        folder, images=pictures(2), predicted=predicted, target=target, iterates=descent(predicted, 4), camera=camera
    )
    assert dict(mpl.rcParams) == before
    return folder, paths


def test_all_figures_are_written_whole(full_report):
    folder, paths = full_report
    assert [path.name for path in paths] == FIGURES
    assert sorted(path.name for path in folder.iterdir()) == sorted(FIGURES)  # and nothing else: no partial file
    for path in paths:
        with Image.open(path) as figure:
            pixels = np.asarray(figure.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert (pixels == 255).all(-1).mean() < 0.95 or path.suffix == ".gif"
        assert len(np.unique(pixels @ (1, 256, 65536))) > 50


def test_the_film_has_a_frame_for_each_iterate_and_dwells_on_the_first_and_last(full_report):
    with Image.open(full_report[0] / "refinement.gif") as film:
        frames, times = [], []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")))
            times.append(film.info["duration"])
    assert len(frames) == 5
    assert times[-1] > 2 * times[0] > 2 * times[1]
    assert len(set(times[1:-1])) == 1
    assert all((a != b).any() for a, b in itertools.pairwise(frames))


def voting_of(iterates, tokens=16, seed=0):
    """Votes near the last iterate, the elements' supports at random."""
    steps, images, set_size, set_dim = iterates.shape
    generator = torch.Generator().manual_seed(seed)
    votes = iterates[-1][:, torch.arange(tokens) % set_size] + 0.1 * torch.randn(
        images, tokens, set_dim, generator=generator
    )
    energies = torch.linspace(5, 1, steps)[:, None].expand(steps, images)
    return Voting(votes, torch.rand(images, set_size, tokens, generator=generator), energies)


def test_supports_are_drawn_where_tokens_vote_and_the_same_each_time(tmp_path, monkeypatch):
    for name in [name for name in vars(report) if name.startswith("draw_") and name != "draw_supports"]:
        monkeypatch.setattr(report, name, lambda path, *_, **__: path)
    predicted, target = sets(CLEVR, 1)
    iterates = descent(predicted, 3)
    voting, said, drawn = voting_of(iterates), [], []
    for number, given in enumerate((voting, voting, voting._replace(supports=voting.supports.flip(2)))):
        paths = write_report(
            tmp_path / str(number),
            images=pictures(1),
            predicted=predicted,
            target=target,
            iterates=iterates,
            voting=given,
        )
        assert [path.name for path in paths] == [*FIGURES[:3], "supports.png", *FIGURES[3:]]
        drawn.append(paths[3].read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].startswith(b"\x89PNG")
    given = {"iterates": iterates, "voting": voting_of(iterates, tokens=12), "say": said.append}
    paths = write_report(tmp_path / "none", images=pictures(1), predicted=predicted, target=target, **given)
    assert [path.name for path in paths] == FIGURES
    assert said == ["No picture of the supports: 12 tokens are no square grid."]


def test_tokens_lie_row_by_row_in_the_colours_they_support():
    supports = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.125], [0.0, 0.0, 0.0, 0.375]], dtype=torch.float64)
    picture = support_colours(supports / 2, ["#ff0000", "#00ff00", "#0000ff"])  # opacity 1 for the heaviest
    np.testing.assert_allclose(picture[..., 3], [[0.5, 1], [0, 0.5]])
    np.testing.assert_allclose(picture[0, :, :3], [(1, 0, 0), (0, 1, 0)])
    np.testing.assert_allclose(picture[1, 1, :3], (0, 0.25, 0.75))


def test_an_object_has_its_number_over_the_tokens_that_support_it(tmp_path, monkeypatch):
    """Numbers as in predictions.png, by confidence, and none upon another however close the objects are."""
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1))
    predicted = objects((0, 0, "red", 0.8), (2, 2, "blue", 0.9), (2, 2, "blue", 0.7), (2, 2, "blue", 0.6))
    supports = torch.zeros(len(predicted), 16, dtype=torch.float64)
    supports[0, 5] = supports[1, 11] = supports[2, 11] = supports[3, 11] = 0.25
    spots = []
    monkeypatch.setattr("setpred.visualise.supports.badge", lambda _, at, text, **__: spots.append((text, *at)))
    seen = Voting(target[:1].repeat(1, 16, 1), supports[None], torch.zeros(1, 1))
    drawn = Descent(pictures(1)[0], predicted[None], target, NOMINAL_CAMERA, CLEVR)
    draw_supports(tmp_path / "supports.png", [drawn], seen, about="")
    on_image, on_map = spots[:4], spots[4:8]
    assert [text for text, *_ in on_image] == ["1", "2", "3", "4"]
    assert [text for text, *_ in on_map] == ["1", "2", "3 extra", "4 extra"]
    width, height = VIEW[0] / 4, VIEW[1] / 4
    assert on_image[0][1:] == pytest.approx((3.5 * width, 2.5 * height - 26))  # token 11: row 2, column 3
    assert on_image[1][1:] == pytest.approx((1.5 * width, 1.5 * height - 26))  # token 5: row 1, column 1
    for (_, *one), (_, *other) in itertools.chain(
        itertools.combinations(on_image, 2), itertools.combinations(on_map, 2)
    ):
        assert np.abs(np.subtract(one, other)).max() >= 0.5
    heights = sorted(y for _, x, y in on_image if x > VIEW[0] / 2)
    assert np.diff(heights).min() >= 26 - 1e-9


def test_figures_do_not_depend_on_what_was_drawn_before_nor_on_matplotlibrc(full_report, tmp_path):
    predicted, target = sets(CLEVR, 9)
    with mpl.rc_context({"text.usetex": True, "font.size": 30, "savefig.dpi": 10, "axes.grid": True}):
        write_report(tmp_path, images=pictures(1), predicted=predicted, target=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        set(FIGURES) - {"refinement.gif", "refinement.png"}
    )
    for name in ("precision_recall.png", "confusion.png", "distance_errors.png"):
        assert (tmp_path / name).read_bytes() == (full_report[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("schema", "left_out"),
    [
        (ElementSchema("flat", [continuous("at", 2), categorical("kind", "a", "b")], max_objects=5), ["pictures"]),
        (ElementSchema("numbers", [continuous("at", 1)], max_objects=5), ["pictures", "confusion"]),
        (ElementSchema("classes", [categorical("kind", "a", "b", "c")], max_objects=5), ["pictures", "distance"]),
        (ElementSchema("bare", [continuous("coords", 3, scale=3.0)], max_objects=5), ["confusion"]),
        (
            ElementSchema(
                "other",
                [categorical("shape", "cone", "cube"), continuous("coords", 3), categorical("color", "pink", "red")],
                max_objects=5,
            ),
            [],
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_a_schema_cannot_show_is_left_out_with_a_sentence(schema, left_out, tmp_path):
    predicted, target = sets(schema, 1)
    said = []
    paths = write_report(
        tmp_path,
        images=pictures(1),
        predicted=predicted,
        target=target,
        iterates=predicted[None],
        schema=schema,
        say=said.append,
    )
    assert len(said) == len(left_out)
    assert all(word in sentence and schema.name in sentence for word, sentence in zip(left_out, said, strict=True))
    missing = {"pictures": FIGURES[:3], "confusion": ["confusion.png"], "distance": ["distance_errors.png"]}
    absent = [name for word in left_out for name in missing[word]]
    assert [path.name for path in paths] == [name for name in FIGURES if name not in absent]


@pytest.mark.parametrize("case", ["mixed", "far too many", "smaller sets and no objects"])
def test_corners_are_drawn_without_a_warning(case, tmp_path):
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
    count = len(predicted)
    paths = write_report(
        tmp_path, images=pictures(count, 20, 30), predicted=predicted, target=target, iterates=predicted[None]
    )
    assert [path.name for path in paths] == FIGURES


def test_errors_name_the_argument(tmp_path):
    predicted, target = sets(CLEVR, 2)
    good = {"images": pictures(2), "predicted": predicted, "target": target}
    for change, message in (
        ({"images": pictures(2).astype(np.float32)}, "expected uint8 images .*, got float32"),
        ({"images": pictures(3)}, "expected 1 to 2 images, .* got 3"),
        ({"images": pictures(0)}, "expected 1 to 2 images, .* got 0"),
        ({"iterates": predicted}, r"expected iterates \[steps \+ 1, m, 5, 19\], got \[2, 5, 19\]"),
        ({"iterates": math.nan * predicted[None]}, "expected iterates without NaN"),
        ({"voting": voting_of(predicted[None])}, "expected the iterates beside their voting"),
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


def test_a_full_disk_leaves_no_partial_figure(tmp_path, monkeypatch):
    predicted, target = sets(CLEVR, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("setpred.files.publish", full)
    with pytest.raises(InputError, match="disk is full"):
        write_report(tmp_path, images=pictures(1), predicted=predicted, target=target)
    assert list(tmp_path.iterdir()) == []


def test_a_long_description_is_cut_to_the_room_beside_the_title():
    figure = new_figure(9, 4)
    name = heading(figure, "Title", "subtitle", "$_{folder/" * 50 + "end.h5")
    aside = figure.texts[-1]
    renderer = figure.canvas.get_renderer()
    assert name.get_window_extent(renderer).x1 < aside.get_window_extent(renderer).x0
    assert aside.get_text().startswith("…")
    assert aside.get_text().endswith("/end.h5")
    assert heading(figure, "Title", "subtitle", "") is figure.texts[-2]


def test_pictures_of_both_layouts_are_the_same():
    images = pictures(2, 20, 30)
    assert (as_pictures(torch.from_numpy(images).permute(0, 3, 1, 2)) == images).all()
    assert (as_pictures(images) == images).all()


def test_unknown_cameras_are_the_nominal_one():
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
def test_outlines_hold_the_projected_body(shape):
    """Random points of the body lie inside the outline's bounding box, and the box is not much larger."""
    generator = np.random.default_rng(1)
    centre, half = np.array([1.0, -0.5, 0.7]), 0.7
    body = generator.uniform(-1, 1, (20_000, 3))
    if shape == "sphere":
        body = body[np.linalg.norm(body, axis=1) < 1]
    if shape == "cylinder":
        body = body[np.linalg.norm(body[:, :2], axis=1) < 1]
    if shape == "cube":
        body = np.clip(1.5 * body, -1, 1)
    seen = NOMINAL_CAMERA.project(centre + half * body, *VIEW)[:, :2]
    outline = np.concatenate(outlines_on_image({"coords": centre, "size": "large", "shape": shape}, NOMINAL_CAMERA))
    np.testing.assert_allclose(outline.min(0), seen.min(0), atol=2.5)
    np.testing.assert_allclose(outline.max(0), seen.max(0), atol=2.5)
    behind = {"coords": 2 * np.array(NOMINAL_CAMERA.location), "size": "large", "shape": shape}
    assert outlines_on_image(behind, NOMINAL_CAMERA) == []


def test_outlines_lie_on_the_objects_of_real_images(clevr_blender):
    cameras = [json.loads(line)["camera"] for line in (clevr_blender / "cameras.jsonl").read_text().splitlines()]
    scenes = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    for scene, location in zip(scenes[:20], cameras, strict=False):
        for obj in scene["objects"]:
            outline = np.concatenate(outlines_on_image(obj | {"coords": obj["3d_coords"]}, Camera(tuple(location))))
            middle = (outline.min(0) + outline.max(0)) / 2
            assert np.abs(middle - obj["pixel_coords"][:2]).max() < 10


def objects(*rows):
    """Elements of (x, y, colour, presence), large metal spheres all."""
    same = {"material": "metal", "shape": "sphere", "size": "large"}
    elements = CLEVR.encode([{"coords": (x, y, 0.7), "color": color, **same} for x, y, color, _ in rows])
    elements[: len(rows), -1] = [presence for *_, presence in rows]
    return torch.from_numpy(elements).double()


def test_comparison_by_hand():
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1), (-2, 0, "green", 1))
    predicted = objects((2, 2.5, "red", 0.7), (0, 0.25, "red", 0.9), (-2, 0, "green", 0.2))
    found = compare(predicted, target, CLEVR)
    assert [obj["confidence"] for obj in found.predicted] == pytest.approx([0.9, 0.7])  # the shy one is not shown
    assert found.partner == [0, 1]
    assert found.distance == pytest.approx([0.25, 0.5])
    assert found.wrong == [[], ["color"]]
    assert [found.real[j]["color"] for j in found.missed] == ["green"]
    assert found.summary == "3 real objects: 1 with all attributes right, 1 with some wrong, 1 missed"
    crowded = compare(predicted.clamp(min=0.6), target[:1], CLEVR)
    assert crowded.partner.count(None) == len(crowded.predicted) - 1
    assert crowded.summary.startswith("1 real object:")


def test_the_area_under_the_drawn_curve_is_the_average_precision(monkeypatch):
    predicted, target = sets(CLEVR, 40, noise=0.2)
    for threshold, score in average_precision(predicted, target).items():
        recall, height = _envelope(predicted, target, threshold, CLEVR)
        assert trapezoid(height, recall) == pytest.approx(score, abs=1e-9)
    monkeypatch.setattr("setpred.visualise.curves.MOST_POINTS", 20)
    recall, height = _envelope(predicted, target, math.inf, CLEVR)
    assert len(recall) <= 2 * 20 + 1
    assert trapezoid(height, recall) == pytest.approx(average_precision(predicted, target)[math.inf], abs=0.05)


def test_the_error_of_a_descent_is_that_of_its_last_matching():
    """An iterate that is the truth in another order than the last one's has an error; the last one has none."""
    target = objects((0, 0, "red", 1), (2, 2, "blue", 1))
    turned = target[[1, 0, *range(2, 10)]]
    steps = torch.stack([target, turned])
    errors = Descent(pictures(1)[0], steps, target, NOMINAL_CAMERA, CLEVR).errors()
    assert errors[1] == 0
    # two elements of ten change: x and y by 2/3, two colour entries by 1
    assert errors[0] == pytest.approx(2 * (2 * (2 / 3) ** 2 / 2 + 2 * 0.5) / 19 / 10)


def test_the_first_images_are_pictured_and_no_more(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_predictions", lambda path, pictures, *_, **__: drawn.append(len(pictures)))
    predicted, target = sets(CLEVR, report.PICTURED + 3, set_size=1)
    write_report(tmp_path, images=pictures(report.PICTURED + 3, 8, 8), predicted=predicted, target=target)
    write_report(tmp_path, images=pictures(2, 8, 8), predicted=predicted, target=target)
    assert drawn == [report.PICTURED, 2]


def test_a_title_in_another_script_is_drawn_without_a_warning(tmp_path, recwarn):
    from setpred.visualise.style import heading, new_figure, save_png

    figure = new_figure(4, 3)
    heading(figure, "Title", "subtitle", about="图片.png")
    save_png(figure, tmp_path / "a.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
