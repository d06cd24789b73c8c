"""Projection against worked examples and real annotations; the camera fitted to annotations."""

import json

import numpy as np
import pytest

from setpred.rendering.camera import ASPECT, JITTER, NOMINAL_CAMERA, Camera, fit_camera


def jittered(seed: int) -> Camera:
    shift = np.random.default_rng(seed).uniform(-JITTER, JITTER, 3)
    return Camera(tuple((np.array(NOMINAL_CAMERA.location) + shift).tolist()))


@pytest.fixture(scope="module")
def annotated(clevr_blender):
    """(camera location, coords, pixel_coords) of every real scene."""
    scenes = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    cameras = [json.loads(line) for line in (clevr_blender / "cameras.jsonl").read_text().splitlines()]
    return [
        (c["camera"], *(np.array([o[key] for o in s["objects"]]) for key in ("3d_coords", "pixel_coords")))
        for s, c in zip(scenes, cameras, strict=True)
    ]


def test_worked_examples():
    """A Blender scene at 4:3, and the published annotation of a CLEVR image."""
    camera = Camera((7.276768684, -6.090636253, 5.179341316))
    axes = [[0.641841, 0.766838, 0], [-0.367385, 0.307500, 0.877765], [0.673104, -0.563386, 0.479091]]
    np.testing.assert_allclose(camera.axes(), axes, atol=1e-6)
    seen = camera.project((1.224435091, 1.373613834, 0.349999994), 320, 240, aspect=320 / 240)
    np.testing.assert_allclose(seen, (220.771, 110.756, 10.592793), atol=1e-3)
    table = np.array([
        (-1.49372, -1.99360, 0.7, 118.97, 131.03, 10.80197), (1.55571, -2.10474, 0.7, 198.37, 190.42, 8.60104),
        (-2.34218, -0.52050, 0.35, 160.93, 118.14, 12.37273), (-0.80731, 1.91412, 0.7, 281.93, 99.58, 12.49500),
        (2.67638, 0.03454, 0.35, 336.87, 195.00, 9.16121),
    ])  # fmt: skip
    seen = Camera((7.8391109, -6.2186819, 4.9761903)).project(table[:, :3], 480, 320)
    assert (np.abs(seen - table[:, 3:]) < (6e-3, 6e-3, 1e-5)).all()


def test_real_annotations_to_their_rounding(annotated):
    for location, coords, pixel_coords in annotated:
        seen = Camera(tuple(location)).project(coords, 480, 320)
        assert (np.abs(seen - pixel_coords) < (0.5 + 1e-6, 0.5 + 1e-6, 1e-5)).all()


@pytest.mark.parametrize("seed", range(5))
def test_axes_are_orthonormal_and_level(seed):
    axes = jittered(seed).axes()
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(np.cross(axes[0], axes[1]), axes[2], atol=1e-14)
    assert axes[0, 2] == 0
    assert axes[1, 2] > 0


@pytest.mark.parametrize(("width", "height", "aspect"), [(480, 320, ASPECT), (64, 64, ASPECT), (320, 240, 4 / 3)])
def test_rays_pass_through_their_pixels(width, height, aspect):
    camera = jittered(1)
    rays = camera.rays(width, height, aspect=aspect)
    depth = np.random.default_rng(0).uniform(2, 20, (height, width))
    seen = camera.project(camera.location + depth[..., None] * rays, width, height, aspect=aspect)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    np.testing.assert_allclose(seen, np.stack([x, y, depth], axis=-1))
    assert (camera.rays(width, height, aspect=aspect, box=(3, 5, 9, 7)) == rays[5:7, 3:9]).all()


def test_other_image_shapes_show_the_same_view_stretched():
    points, camera = np.random.default_rng(0).uniform(-3, 3, (100, 3)), jittered(2)
    full, square = camera.project(points, 480, 320), camera.project(points, 64, 64)
    np.testing.assert_allclose(square, full * [64 / 480, 64 / 320, 1])
    np.testing.assert_allclose(camera.project((0, 0, 0), 64, 64)[:2], (32, 32))


def test_fit_recovers_real_cameras(annotated):
    for location, coords, pixel_coords in annotated:
        np.testing.assert_allclose(fit_camera(coords, pixel_coords, 480, 320).location, location, atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_fit_recovers_jittered_cameras(count):
    for seed in range(20):
        camera, rng = jittered(seed), np.random.default_rng(seed)
        coords = np.concatenate([rng.uniform(-3, 3, (count, 2)), rng.choice([0.35, 0.7], (count, 1))], axis=1)
        exact = camera.project(coords, 480, 320)
        rounded = np.append(np.round(exact[:, :2]), exact[:, 2:], axis=1)
        for pixel_coords, error in ((exact, 1e-6), (rounded, 0.4 if count == 2 else 0.01)):
            found = fit_camera(coords, pixel_coords, 480, 320)
            assert found is None or np.abs(np.subtract(found.location, camera.location)).max() < error
            assert found is not None or count == 2


def test_fit_returns_none_without_a_determined_or_consistent_camera():
    coords = np.array([(-1.5, -2, 0.7), (1.5, -2.1, 0.7), (-2.3, -0.5, 0.35), (2.6, 0.1, 0.35)])
    pixel_coords = NOMINAL_CAMERA.project(coords, 480, 320)
    assert fit_camera(coords, pixel_coords, 480, 320) is not None
    for which in ([], [0], [0, 0, 0]):
        assert fit_camera(coords[which], pixel_coords[which], 480, 320) is None
    assert fit_camera(coords, pixel_coords[::-1], 480, 320) is None
    assert fit_camera(coords, pixel_coords, 320, 240) is None
    assert fit_camera(coords, np.where(pixel_coords > 10, np.nan, pixel_coords), 480, 320) is None
    with pytest.raises(ValueError, match="as many pixel_coords as coords, got 2 and 4"):
        fit_camera(coords, pixel_coords[:2], 480, 320)
