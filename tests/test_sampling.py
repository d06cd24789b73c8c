"""CLEVR's placement rules hold for sampled scenes, and the draws have the right frequencies."""

from itertools import combinations

import numpy as np
import pytest

from setpred.errors import InputError
from setpred.rendering.camera import NOMINAL_CAMERA
from setpred.rendering.renderer import instance_map
from setpred.rendering.sampling import DIRECTIONS, sample_scene
from setpred.rendering.scenes import HALF_SIZE, NOMINAL_LAMPS
from setpred.schema import CLEVR


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(300)]


def within(counts: np.ndarray) -> bool:
    """Counts of equally likely outcomes, all within 4.5 standard deviations."""
    total, share = counts.sum(), 1 / len(counts)
    return bool(np.abs(counts - total * share).max() < 4.5 * np.sqrt(total * share * (1 - share)))


def test_objects_keep_their_distances(scenes):
    for scene in scenes:
        for obj in scene.objects:
            assert np.abs(obj.coords[:2]).max() < 3
            assert obj.coords[2] == HALF_SIZE[obj.size]
        for a, b in combinations(scene.objects, 2):
            apart = np.subtract(a.coords, b.coords)[:2]
            assert np.hypot(*apart) - HALF_SIZE[a.size] - HALF_SIZE[b.size] >= 0.25
            assert np.abs(DIRECTIONS @ apart).min() >= 0.4


def test_directions_are_those_of_the_nominal_camera():
    right, _, backward = NOMINAL_CAMERA.axes()
    np.testing.assert_allclose(DIRECTIONS[0], right[:2], atol=1e-7)
    np.testing.assert_allclose(DIRECTIONS[1], -backward[:2] / np.hypot(*backward[:2]), atol=1e-7)


def test_counts_and_attributes_are_uniform(scenes):
    assert within(np.bincount([len(scene.objects) for scene in scenes], minlength=11)[3:])
    objects = [obj.as_dict() for scene in scenes for obj in scene.objects]
    # size is left out: restarts of crowded scenes favour small objects, here as in CLEVR
    for name in ("material", "color", "shape"):
        classes = CLEVR.field(name).classes
        assert within(np.bincount([classes.index(obj[name]) for obj in objects], minlength=len(classes)))
    quarter = [int(obj["rotation"] // 90) for obj in objects]
    assert within(np.bincount(quarter, minlength=4))


def test_sizes_are_uniform_where_there_is_room():
    rng = np.random.default_rng(0)
    sizes = [sample_scene(rng, objects=(1, 1), min_visible_pixels=0).objects[0].size for _ in range(400)]
    assert within(np.array([sizes.count("large"), sizes.count("small")]))


def test_camera_and_lamps_are_jittered_over_their_whole_range(scenes):
    shifts = np.array([np.subtract(s.camera.location, NOMINAL_CAMERA.location) for s in scenes]) / 0.5
    lamps = [np.array([np.subtract(s.lamps[name], at) for s in scenes]) for name, at in NOMINAL_LAMPS.items()]
    for shift in [shifts, *lamps]:
        assert np.abs(shift).max() <= 1
        assert shift.max(axis=0).min() > 0.9
        assert shift.min(axis=0).max() < -0.9


def test_every_object_shows_enough_pixels(scenes):
    for scene in scenes[:60]:
        counts = np.bincount(1 + instance_map(scene, 480, 320).reshape(-1), minlength=len(scene.objects) + 1)[1:]
        assert counts.min() > 140  # 200 on a grid of a sixteenth of the pixels
    hidden = [
        np.bincount(1 + instance_map(scene, 480, 320).reshape(-1), minlength=len(scene.objects) + 1)[1:].min()
        for scene in (sample_scene(np.random.default_rng(k), objects=(10, 10), min_visible_pixels=0) for k in range(20))
    ]
    assert min(hidden) < 150


def test_a_scene_depends_on_the_generator_alone():
    first = sample_scene(np.random.default_rng(7))
    np.random.seed(1)
    assert sample_scene(np.random.default_rng(7)) == first
    assert sample_scene(np.random.default_rng(8)) != first
    rng = np.random.default_rng(7)
    assert sample_scene(rng) == first
    assert sample_scene(rng) != first


@pytest.mark.parametrize("objects", [(0, 0), (1, 1), (10, 10)])
def test_the_count_is_within_its_range(objects):
    scene = sample_scene(np.random.default_rng(0), objects=objects)
    assert len(scene.objects) == objects[0]


def test_objects_encode_by_the_schema(scenes):
    for scene in scenes[:20]:
        elements = CLEVR.encode([obj.as_dict() for obj in scene.objects])
        decoded = CLEVR.decode(elements)
        assert len(decoded) == len(scene.objects)
        for got, obj in zip(decoded, scene.objects, strict=True):
            np.testing.assert_allclose(got["coords"], obj.coords, atol=1e-6)
            assert [got[name] for name in ("material", "color", "shape", "size")] == [
                obj.material,
                obj.color,
                obj.shape,
                obj.size,
            ]


def test_impossible_wishes_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="least <= most, got 5 and 3"):
        sample_scene(rng, objects=(5, 3))
    with pytest.raises(InputError, match="least <= most, got -1 and 3"):
        sample_scene(rng, objects=(-1, 3))
    with pytest.raises(InputError, match="no room for 40 objects"):
        sample_scene(rng, objects=(40, 40))
