"""Geometry against ray marching, shadows against the straight line to the lamp, looks against CLEVR's measured tables
and pictures."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from setpred.rendering.bodies import Bodies
from setpred.rendering.camera import Camera
from setpred.rendering.ground import FAR, floor_height, ground_hit, ground_seen
from setpred.rendering.lighting import block, block_inside, lights_at, shadow_boxes
from setpred.rendering.renderer import instance_map, render
from setpred.rendering.sampling import sample_scene
from setpred.rendering.scenes import HALF_SIZE, Scene, SceneObject
from setpred.rendering.shapes import HIT, NORMAL


def one(shape="sphere", material="rubber", color="gray", size="large", x=0.0, y=0.0, rotation=0.4) -> SceneObject:
    return SceneObject((x, y, HALF_SIZE[size]), rotation, material, color, shape, size)


def sampled(seed: int, objects=(3, 10)) -> Scene:
    return sample_scene(np.random.default_rng(seed), objects=objects)


def excess(shape: str, q: np.ndarray) -> np.ndarray:
    """The obvious twin: the implicit equation of a unit shape at points `[..., 3]`, negative inside."""
    if shape == "sphere":
        return (q**2).sum(-1) - 1
    if shape == "cube":
        return (np.maximum(np.abs(q) - 0.75, 0) ** 3).sum(-1) / 0.25**3 - 1
    radius = np.hypot(q[..., 0], q[..., 1])
    return (np.maximum(radius - 0.9, 0) ** 4 + np.maximum(np.abs(q[..., 2]) - 0.9, 0) ** 4) / 0.1**4 - 1


def inside(obj: SceneObject, points: np.ndarray) -> np.ndarray:
    """Whether world points `[..., 3]` lie in an object and above the floor that it is sunk into."""
    c, s = np.cos(obj.rotation), np.sin(obj.rotation)
    q = (points - obj.coords) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) / HALF_SIZE[obj.size]
    floor = floor_height(np.array(obj.coords)[:, None])[0]
    return (excess(obj.shape, q) < 0) & (points[..., 2] > floor)


def marched(scene: Scene, width: int, height: int) -> np.ndarray:
    """The instance map by walking along each pixel's ray in small steps."""
    steps = np.arange(5, 17, 0.015)
    points = scene.camera.location + steps[:, None] * scene.camera.rays(width, height)[:, :, None]
    first = np.full((height, width), len(steps))
    ids = np.full((height, width), -1)
    for index, obj in enumerate(scene.objects):
        hit = inside(obj, points)
        at = np.where(hit.any(-1), hit.argmax(-1), len(steps))
        ids[at < first] = index
        first = np.minimum(first, at)
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_instance_map_agrees_with_ray_marching(seed):
    scene = sampled(seed)
    fast, slow = instance_map(scene, 36, 24), marched(scene, 36, 24)
    assert set(np.unique(slow)) >= set(range(len(scene.objects)))
    assert (fast != slow).mean() < 0.005  # steps of 0.015 miss rays that only graze


@pytest.mark.parametrize("shape", HIT)
def test_hits_lie_on_the_surface_and_normals_are_its_gradient(shape):
    rng = np.random.default_rng(0)
    origin = rng.normal(size=(3, 5000))
    origin *= 10 / np.linalg.norm(origin, axis=0)
    direction = rng.uniform(-1.2, 1.2, (3, 5000)) - origin
    t = HIT[shape](origin, direction)
    assert (~np.isfinite(t)).sum() > 500
    there = np.isfinite(t)
    points = (origin + np.where(there, t, 0) * direction)[:, there]
    assert np.abs(excess(shape, points.T)).max() < 0.05  # of an edge of width 1/4 or 1/10, so 0.004 in space
    step = 1e-6
    gradient = [excess(shape, points.T + d) - excess(shape, points.T - d) for d in step * np.eye(3)]
    gradient /= np.linalg.norm(gradient, axis=0)
    normals = NORMAL[shape](points)
    normals /= np.linalg.norm(normals, axis=0)
    np.testing.assert_allclose(normals, gradient, atol=1e-5)
    cosine = (normals * direction[:, there]).sum(0) / np.linalg.norm(direction[:, there], axis=0)
    assert (cosine < 0).mean() > 0.995  # the near side; rays that only graze an edge may stop just behind it
    assert cosine.max() < 0.2
    # no earlier point of the ray is inside
    before = origin[:, there, None] + (t[there, None] * np.linspace(0.8, 0.9999, 200)) * direction[:, there, None]
    assert excess(shape, np.moveaxis(before, 0, -1)).min() > -0.01


def test_the_nearer_object_hides_the_farther():
    near, far = one("cube", x=1.5, y=-1.3), one("sphere", x=-0.1, y=0.1)
    for objects in ((near, far), (far, near)):
        scene = Scene(objects)
        ids = instance_map(scene, 96, 64)
        alone = instance_map(Scene((near,)), 96, 64) == 0
        assert (ids[alone] == objects.index(near)).all()
        assert (ids == objects.index(far)).sum() < (instance_map(Scene((far,)), 96, 64) == 0).sum()
    np.testing.assert_array_equal(
        render(Scene((near, far)), width=64, height=64), render(Scene((far, near)), width=64, height=64)
    )


def test_ground_points_agree_with_single_rays():
    camera = sampled(0).camera
    x, y = np.linspace(-0.5, 0.5, 24), np.linspace(0.3, -0.3, 16)
    grid = ground_seen(camera, x, y)
    right, up, backward = camera.axes()[:, :, None, None]
    rays = (right * x + up * y[:, None] - backward).reshape(3, -1)
    origin = np.array(camera.location)[:, None]
    t = ground_hit(origin, rays)
    assert (t < FAR).mean() > 0.9
    points = (origin + t * rays)[:, t < FAR]
    np.testing.assert_allclose(grid.reshape(3, -1)[:, t < FAR], points, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(points[2], floor_height(points), atol=0.02)


def test_shadows_fall_where_an_object_hides_the_lamp():
    rng = np.random.default_rng(0)
    agree = []
    for seed in range(4):
        scene = sampled(seed)
        bodies = Bodies.of(scene.objects)
        points = np.stack([*rng.uniform(-4, 4, (2, 300)), np.full(300, 0.02)])
        free = ~np.any([inside(obj, points.T) for obj in scene.objects], axis=0)
        points = points[:, free].astype(np.float32)
        lights = lights_at(points, scene.lamps)
        share = block(lights, points, np.full(points.shape[1], -1), bodies).irradiance / lights.irradiance
        along = np.arange(0.01, 6, 0.02)
        for light in range(4):
            line = points.T[:, None] + along[:, None] * lights.direction[:, light].T[:, None]
            hidden = np.any([inside(obj, line).any(-1) for obj in scene.objects], axis=0)
            sure = np.abs(share[light] - 0.5) > 0.25
            agree.append((hidden == (share[light] < 0.5))[sure])
    agree = np.concatenate(agree)
    assert agree.mean() > 0.98  # edges are rounded in the shapes, not quite so in the shadows
    assert len(agree) > 3000


@pytest.mark.parametrize("seed", range(5))
def test_looking_for_shadows_in_their_boxes_only_loses_none(seed):
    scene = sampled(seed)
    bodies = Bodies.of(scene.objects)
    width, height = 48, 32
    x = ((np.arange(width) + 0.5) / width - 0.5) * 32 / 35
    y = (0.5 - (np.arange(height) + 0.5) / height) * 32 / 35 / 1.5
    points = ground_seen(scene.camera, x.astype(np.float32), y.astype(np.float32)).reshape(3, -1)
    lights = lights_at(points, scene.lamps)
    boxes = shadow_boxes(bodies, scene.lamps, scene.camera, width, height, aspect=1.5)
    inside_boxes = block_inside(lights, points, bodies, boxes, width).irradiance
    everywhere = block(lights, points, np.full(points.shape[1], -1), bodies).irradiance
    np.testing.assert_allclose(inside_boxes, everywhere, atol=2e-3)
    assert (everywhere < 0.5 * lights.irradiance).any()


def test_a_shadow_darkens_the_ground():
    obj = one("cylinder")
    width, height = 96, 64
    scene = Scene((obj,))
    bare, shaded = (render(s, width=width, height=height).astype(float).sum(-1) for s in (Scene(()), scene))
    rays = scene.camera.rays(width, height)
    points = scene.camera.location + rays * (scene.camera.location[2] / -rays[..., 2:])
    to_lamp = np.array(scene.lamps["key"]) - points
    line = points[..., None, :] + np.linspace(0, 0.8, 200)[:, None] * to_lamp[..., None, :]
    hidden = inside(obj, line).any(-1)
    ground = (instance_map(scene, width, height) == -1) & (np.abs(points[..., :2]).max(-1) < 5)
    ratio = shaded / bare
    assert (ground & hidden).sum() > 30
    assert ratio[ground & hidden].mean() < ratio[ground & ~hidden].mean() - 0.03
    assert ratio[ground].min() < 0.75  # where several lights are hidden
    assert ratio[ground].max() < 1.1


@pytest.mark.parametrize("shape", HIT)
def test_metal_differs_from_rubber(shape):
    looks = {}
    for material in ("rubber", "metal"):
        scene = Scene((one(shape, material, "blue"),))
        image = render(scene, width=240, height=160).astype(float).mean(-1)
        looks[material] = image[instance_map(scene, 240, 160) == 0]
    # highlights and the black sky: more contrast on metal
    assert looks["metal"].std() > 1.1 * looks["rubber"].std()
    assert looks["metal"].max() > looks["rubber"].max() + 10
    assert np.abs(looks["metal"] - looks["rubber"]).mean() > 8


def test_a_picture_depends_on_the_scene_alone():
    scenes = [sampled(seed) for seed in range(8)]
    pictures = [render(scene, width=64, height=64) for scene in scenes]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda scene: render(scene, width=64, height=64), scenes))
    np.testing.assert_array_equal(pictures, again)
    assert pictures[0].dtype == np.uint8
    assert pictures[0].shape == (64, 64, 3)
    assert pictures[0].flags.c_contiguous
    moved = replace(scenes[0], camera=Camera((7.0, -6.5, 5.3)))
    assert (render(moved, width=64, height=64) != pictures[0]).any()


def test_a_square_picture_is_the_squeezed_view():
    scene = sampled(3)
    wide = Image.fromarray(render(scene, width=480, height=320, samples=1)).resize((64, 64), Image.Resampling.BOX)
    square = render(scene, width=64, height=64, samples=3)
    assert np.abs(np.asarray(wide).astype(float) - square).mean() < 2


@pytest.mark.parametrize("count", [0, 1])
def test_small_sizes_and_empty_scenes(count):
    scene = Scene((one(),) * count)
    assert render(scene, width=1, height=1).shape == (1, 1, 3)
    assert render(scene, width=5, height=3, samples=1).shape == (3, 5, 3)
    assert (instance_map(scene, 30, 20) >= 0).any() == bool(count)


def test_the_empty_ground_has_the_measured_brightness():
    image = render(Scene(()), width=320, height=240, aspect=320 / 240).astype(int)
    measured = {
        (4, 4): (105, 105, 105),
        (315, 4): (103, 104, 103),
        (160, 40): (107, 107, 107),
        (4, 120): (135, 136, 141),
        (160, 120): (135, 135, 134),
        (315, 120): (120, 119, 118),
        (4, 235): (121, 120, 119),
        (160, 235): (151, 148, 144),
        (315, 235): (151, 149, 144),
    }
    for (x, y), color in measured.items():
        np.testing.assert_allclose(image[y, x], color, atol=3)


def test_objects_have_the_measured_colours():
    measured = {  # medians at the middle of unoccluded objects: rubber, metal
        "gray": ((88, 86, 83), (69, 69, 68)),
        "red": ((120, 55, 53), (95, 42, 40)),
        "blue": ((60, 78, 128), (49, 66, 110)),
        "green": ((50, 93, 40), (41, 80, 33)),
        "brown": ((104, 78, 45), (84, 63, 35)),
        "purple": ((108, 58, 123), (90, 48, 106)),
        "cyan": ((58, 124, 121), (48, 108, 109)),
        "yellow": ((143, 136, 64), (118, 112, 52)),
    }
    seen = {(color, metal): [] for color in measured for metal in (False, True)}
    rng = np.random.default_rng(0)
    for _ in range(120):
        scene = sample_scene(rng, objects=(3, 6))
        image, ids = render(scene, width=96, height=64), instance_map(scene, 96, 64)
        for index, obj in enumerate(scene.objects):
            x, y, _ = scene.camera.project(obj.coords, 96, 64).astype(int)
            if 0 <= x < 96 and 0 <= y < 64 and ids[y, x] == index:
                seen[obj.color, obj.material == "metal"].append(image[y, x])
    for color, pair in measured.items():
        for metal, expected in zip((False, True), pair, strict=True):
            assert len(seen[color, metal]) > 10
            np.testing.assert_allclose(np.median(seen[color, metal], axis=0), expected, atol=22 if metal else 10)


def test_pictures_resemble_real_ones(clevr_blender):
    with open(clevr_blender / "scenes" / "CLEVR_val_scenes.json") as file:
        records = json.load(file)["scenes"]
    with open(clevr_blender / "cameras.jsonl") as file:
        cameras = [json.loads(line) for line in file]
    errors, ground_errors = [], []
    for record, camera in list(zip(records, cameras, strict=True))[::8]:
        objects = tuple(
            SceneObject(tuple(o["3d_coords"]), o["rotation"], o["material"], o["color"], o["shape"], o["size"])
            for o in record["objects"]
        )
        lamps = {name: tuple(camera["lights"][f"Lamp_{name.title()}"]) for name in ("key", "fill", "back")}
        scene = Scene(objects, Camera(tuple(camera["camera"])), lamps)
        with Image.open(clevr_blender / "images" / "val" / record["image_filename"]) as file:
            real = np.asarray(file.convert("RGB").resize((96, 64), Image.Resampling.BILINEAR)).astype(float)
        error = np.abs(render(scene, width=96, height=64) - real).mean(-1)
        errors.append(error.mean())
        ground_errors.append(error[instance_map(scene, 96, 64) < 0].mean())
        # shifted by a pixel, the picture fits less well: camera and silhouettes are right
        for axis in (0, 1):
            for shift in (-1, 1):
                moved = np.roll(render(scene, width=96, height=64), shift, axis)
                assert np.abs(moved - real)[1:-1, 1:-1].mean() > 1.1 * error[1:-1, 1:-1].mean()
    assert np.mean(errors) < 2.5
    assert np.mean(ground_errors) < 1.5
