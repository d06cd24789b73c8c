"""CLEVR's rules hold for sampled and for real scenes, and both have the same distribution."""

import json
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from setpred.errors import InputError
from setpred.rendering import sampling
from setpred.rendering.camera import NOMINAL_CAMERA
from setpred.rendering.records import read_cameras, scene_of
from setpred.rendering.renderer import annotate
from setpred.rendering.sampling import DIRECTIONS, SceneRules, all_visible, count_visible, sample_scenes
from setpred.rendering.scenes import COLORS, HALF_SIZE, NOMINAL_LAMPS, SceneObject
from setpred.schema import CLEVR

ATTRIBUTES = ("material", "color", "shape", "size")


def generators(count, seed=0):
    return [np.random.default_rng([seed, number]) for number in range(count)]


def crowded(count):
    return sample_scenes(generators(count, seed=2), SceneRules(objects=(9, 9), min_visible_pixels=0))


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(generators(400))


@pytest.fixture(scope="module")
def real_scenes(clevr_blender):
    cameras = read_cameras(clevr_blender / "cameras.jsonl")
    records = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    return [scene_of(record, *cameras[record["image_index"]]) for record in records]


def visible_pixels(scenes, width, height):
    """Pixels that each object of each scene shows."""
    counts = annotate(scenes, width=width, height=height).visible_pixels.numpy()
    return [row[: len(scene.objects)] for row, scene in zip(counts, scenes, strict=True)]


def shifts(scenes):
    """Jitter of camera and lamps, `[scenes, 3]` by name."""
    moved = {"camera": [np.subtract(scene.camera.location, NOMINAL_CAMERA.location) for scene in scenes]}
    moved |= {name: [np.subtract(scene.lamps[name], at) for scene in scenes] for name, at in NOMINAL_LAMPS.items()}
    return {name: np.array(shift) for name, shift in moved.items()}


def pairs(scene):
    """Gap between outlines and margins along `right` and `behind`, for all pairs of objects `[pairs, 3]`."""
    found = []
    for a, b in combinations(scene.objects, 2):
        apart = np.subtract(a.coords, b.coords)[:2]
        found.append((np.hypot(*apart) - HALF_SIZE[a.size] - HALF_SIZE[b.size], *np.abs(DIRECTIONS @ apart)))
    return np.array(found).reshape(-1, 3)


def measures(scenes):
    """Numbers whose distributions describe a set of scenes, by name."""
    objects = [obj for scene in scenes for obj in scene.objects]
    places = np.array([obj.coords[:2] for obj in objects])
    between, seen = [pairs(scene) for scene in scenes], visible_pixels(scenes, 120, 80)
    columns = {
        "x y": places,
        "right behind": places @ DIRECTIONS.T,
        "rotation": [[obj.rotation] for obj in objects],
        "count": [[len(scene.objects)] for scene in scenes],
        "share of large": [[np.mean([obj.size == "large" for obj in scene.objects])] for scene in scenes],
        "gap margin margin": np.concatenate(between),
        "least gap margin margin": [pair.min(0) for pair in between],
        "visible": np.concatenate(seen)[:, None],
        "least visible": [[row.min()] for row in seen],
    } | shifts(scenes)
    return {(name, k): column for name, table in columns.items() for k, column in enumerate(np.array(table).T)}


@pytest.fixture(scope="module")
def ours(scenes):
    return measures(scenes)


def classes(objects, name):
    """Number of objects of each class of an attribute."""
    names = CLEVR.field(name).classes
    return np.bincount([names.index(getattr(obj, name)) for obj in objects], minlength=len(names))


def uniform(counts):
    """Whether counts of equally likely outcomes are within 4.5 standard deviations."""
    total, share = counts.sum(), 1 / len(counts)
    return bool(np.abs(counts - total * share).max() < 4.5 * np.sqrt(total * share * (1 - share)))


@pytest.mark.parametrize("which", ["scenes", "real_scenes"])
def test_the_rules_hold(which, request):
    scenes = request.getfixturevalue(which)
    for scene in scenes:
        assert 3 <= len(scene.objects) <= 10
        assert (pairs(scene) >= (0.25 - 1e-6, 0.4 - 1e-6, 0.4 - 1e-6)).all()
        for obj in scene.objects:
            assert np.abs(obj.coords[:2]).max() < 3
            assert abs(obj.coords[2] - HALF_SIZE[obj.size]) < 1e-6
            assert 0 <= obj.rotation < 360
    for name, shift in shifts(scenes).items():
        assert np.abs(shift).max() <= (0.5 if name == "camera" else 1) + 1e-6
    # the floor rises by up to 0.03 under far objects and hides a few pixels, which the rule ignores
    assert min(row.min() for row in visible_pixels(scenes[:40], 480, 320)) > 180


def test_sampled_and_real_scenes_have_one_distribution(ours, scenes, real_scenes):
    real = measures(real_scenes)
    chances = {name: stats.ks_2samp(ours[name], real[name]).pvalue for name in real}
    for name in ATTRIBUTES:
        tables = [classes([obj for scene in group for obj in scene.objects], name) for group in (scenes, real_scenes)]
        chances[name] = stats.chi2_contingency(tables).pvalue
    assert min(chances.values()) > 1e-3, chances


def test_counts_attributes_and_jitters_are_uniform(scenes):
    objects = [obj for scene in scenes for obj in scene.objects]
    assert uniform(np.bincount([len(scene.objects) for scene in scenes], minlength=11)[3:])
    for name in ("material", "color", "shape"):
        assert uniform(classes(objects, name))
    # restarts of crowded scenes favour small objects, here as in CLEVR: single ones have uniform sizes
    lonely = sample_scenes(generators(400), SceneRules(objects=(1, 1)))
    assert uniform(classes([obj for scene in lonely for obj in scene.objects], "size"))
    assert uniform(np.bincount((np.array([obj.rotation for obj in objects]) // 45).astype(int), minlength=8))
    for name, shift in shifts(scenes).items():
        reach = 0.95 * (0.5 if name == "camera" else 1)
        assert shift.max(axis=0).min() > reach
        assert shift.min(axis=0).max() < -reach


def test_nominal_camera_lamps_and_directions():
    scene = SceneRules(camera_jitter=0, lamp_jitter=0, objects=(0, 0)).sample(np.random.default_rng(0))
    assert (scene.objects, scene.camera, scene.lamps) == ((), NOMINAL_CAMERA, NOMINAL_LAMPS)
    right, _, backward = NOMINAL_CAMERA.axes()
    np.testing.assert_allclose(DIRECTIONS[0], right[:2], atol=1e-7)
    np.testing.assert_allclose(DIRECTIONS[1], -backward[:2] / np.hypot(*backward[:2]), atol=1e-7)


@pytest.mark.parametrize("condition", ["cogent-a", "cogent-b"])
def test_conditions_of_cogent(condition):
    """Cubes and cylinders have disjoint colours, exchanged in the other condition; spheres have all."""
    palettes = sampling.CONDITIONS[condition]
    rules = SceneRules(objects=(5, 5), palettes=palettes, min_visible_pixels=0)
    drawn = [obj for scene in sample_scenes(generators(120), rules) for obj in scene.objects]
    halves = {"gray", "blue", "brown", "yellow"}, {"red", "green", "purple", "cyan"}
    cube, cylinder = halves if condition == "cogent-a" else halves[::-1]
    for shape, expected in {"cube": cube, "cylinder": cylinder, "sphere": set(COLORS)}.items():
        mine = [palettes[shape].index(obj.color) for obj in drawn if obj.shape == shape]
        assert set(palettes[shape]) == expected
        assert uniform(np.bincount(mine, minlength=len(expected)))
    assert uniform(classes(drawn, "shape"))


def test_a_scene_depends_on_its_generator_alone():
    rules = SceneRules(objects=(3, 9))
    together = sample_scenes(generators(12), rules)
    assert sample_scenes(generators(12)[::-1], rules)[::-1] == together
    np.random.seed(1)
    rng = np.random.default_rng([0, 5])
    assert rules.sample(rng) == together[5] != together[4]
    assert rules.sample(rng) != together[5]
    assert sample_scenes([]) == []


def test_counted_pixels_are_those_of_the_image_and_above_their_bound():
    for scene, expected in zip(crowded(6), visible_pixels(crowded(6), 480, 320), strict=True):
        counts = np.array([count_visible(scene.objects, number, scene.camera) for number in range(9)])
        assert (counts >= expected - 2).all()  # rounding
        assert (counts <= expected + 40).all()  # the floor, as above
    assert min(row.min() for row in visible_pixels(crowded(20), 240, 160)) < 30  # without the rule
    for scene in crowded(40):
        bound = sampling.visible_bound(scene.objects, scene.camera)
        for number in np.flatnonzero((bound > 150) & (bound < 600)):  # near the rule's 200
            assert bound[number] < count_visible(scene.objects, number, scene.camera) + 50


def test_hidden_and_cut_objects_are_rejected():
    def block(position, size="small"):
        return SceneObject((*position, HALF_SIZE[size]), 0.0, "metal", "red", "cube", size)

    toward = np.array(NOMINAL_CAMERA.location[:2]) / np.hypot(*NOMINAL_CAMERA.location[:2])
    behind, front = block(-2.4 * toward), block(-1.2 * toward, "large")
    for objects, pixels, visible in (
        ([], 200, True), ([behind], 200, True), ([front], 200, True),
        ([behind, front], 200, False), ([front, behind], 200, False), ([front, behind], 0, True),
        ([block(6 * DIRECTIONS[0])], 1, False), ([block(12 * toward)], 1, False),
    ):  # fmt: skip
        assert all_visible(objects, NOMINAL_CAMERA, pixels) == visible
    scenes = sample_scenes(generators(10), SceneRules(objects=(3, 4), min_visible_pixels=900))
    assert min(row.min() for row in visible_pixels(scenes, 480, 320)) > 880


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"objects": (5, 3)}, "least <= most, got 5 and 3"),
        ({"margin": -0.1}, "margin: expected a number from 0 to inf, got -0.1"),
        ({"min_distance": float("inf")}, "min_distance: expected a number"),
        ({"tries": 0}, "tries: expected a number from 1"),
        ({"camera_jitter": 4}, "camera_jitter: expected a number from 0 to 3, got 4"),
        ({"sizes": ()}, "sizes: expected one or more of large, small, got"),
        ({"materials": ("glass",)}, "materials: expected one or more of rubber, metal, got"),
        ({"palettes": {}}, "palettes: expected one or more of sphere, cube, cylinder"),
        ({"palettes": {"cube": ("pink",)}}, "palettes, cube: expected one or more of gray, red"),
        ({"objects": (40, 40), "restarts": 50}, r"no room for 40 objects in 50 tries \(0 had room"),
        ({"objects": (2, 2), "min_visible_pixels": 1e6, "restarts": 50}, r"\(50 had room for all, but hid one\)"),
    ],
)
def test_invalid_and_impossible_rules_raise(rules, words):
    with pytest.raises(InputError, match=words):
        SceneRules(**rules).sample(np.random.default_rng(0))
