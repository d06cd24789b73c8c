"""Geometry against ray marching, shadows against the straight line to the lamp, looks against CLEVR's measured tables
and pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from setpred.errors import InputError
from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import ASPECT, NOMINAL_CAMERA, Camera
from setpred.rendering.ground import FAR, floor_height, ground_depth, ground_hit, ground_normal
from setpred.rendering.lighting import Lights, block, block_ground, lamp_table, lights_at
from setpred.rendering.materials import fresnel, highlight
from setpred.rendering.renderer import annotate, encode, render, render_ground, soften
from setpred.rendering.sampling import sample_scene
from setpred.rendering.scenes import HALF_SIZE, NOMINAL_LAMPS, SHAPES, Scene, SceneBatch, SceneObject
from setpred.rendering.shapes import HITS, NORMALS
from setpred.rendering.vectors import pixels_of
from setpred.rendering.visibility import View, nearest_hit


def one(shape="sphere", material="rubber", color="gray", size="large", x=0.0, y=0.0, rotation=0.4) -> SceneObject:
    return SceneObject((x, y, HALF_SIZE[size]), rotation, material, color, shape, size)


def sampled(seed: int, objects=(3, 10)) -> Scene:
    return sample_scene(np.random.default_rng(seed), objects=objects)


def picture(scene: Scene, width: int, height: int, **options) -> np.ndarray:
    return render([scene], width=width, height=height, **options)[0].numpy()


def instances(scene: Scene, width: int, height: int) -> np.ndarray:
    return annotate([scene], width=width, height=height).instances[0].numpy()


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
    floor = floor_height(torch.tensor(obj.coords)[:, None]).item()
    return (excess(obj.shape, q) < 0) & (points[..., 2] > floor)


def marched(scene: Scene, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The instance map and the objects' depth by walking along each pixel's ray in small steps."""
    steps = np.arange(5, 17, 0.015)
    points = scene.camera.location + steps[:, None] * scene.camera.rays(width, height)[:, :, None]
    first = np.full((height, width), len(steps))
    ids = np.full((height, width), -1)
    for index, obj in enumerate(scene.objects):
        hit = inside(obj, points)
        at = np.where(hit.any(-1), hit.argmax(-1), len(steps))
        ids[at < first] = index
        first = np.minimum(first, at)
    return ids, np.append(steps, np.inf)[first]


@pytest.mark.parametrize("seed", range(4))
def test_instances_and_depth_agree_with_ray_marching(seed):
    scene = sampled(seed)
    truth = annotate([scene], width=36, height=24)
    ids, depth = truth.instances[0].numpy(), truth.depth[0].numpy()
    slow_ids, slow_depth = marched(scene, 36, 24)
    assert set(np.unique(slow_ids)) >= set(range(len(scene.objects)))
    assert (ids != slow_ids).mean() < 0.005  # steps of 0.015 miss rays that only graze
    same = (ids == slow_ids) & (ids >= 0)
    assert np.quantile(np.abs(depth - slow_depth + 0.0075)[same], 0.99) < 0.008
    np.testing.assert_array_equal(
        truth.visible_pixels[0], [(ids == number).sum() for number in range(len(scene.objects))]
    )


def test_depth_in_closed_form():
    """The camera looks at the origin: straight ahead lie a ball at |c| - r, the face of a cube, the floor."""
    for camera in (NOMINAL_CAMERA, Camera((7.0, -6.0, 5.0))):
        distance = np.linalg.norm(camera.location)
        lifted = replace(one("sphere"), coords=(0.0, 0.0, 0.0))  # half sunk, so that the ray meets its middle
        cube = replace(one("cube", rotation=np.arctan2(camera.location[1], camera.location[0])), coords=(0.0, 0.0, 0.7))
        scenes = [Scene((lifted,), camera), Scene((cube,), camera), Scene((), camera)]
        depth = annotate(scenes, width=101, height=101).depth[:, 50, 50]
        assert depth[0] == pytest.approx(distance - 0.7, abs=1e-4)
        backward = np.array(camera.location) / distance
        # the ray through the origin meets the front face x = 0.7 of the turned cube at height z/x * 0.7
        assert depth[1] == pytest.approx(distance - 0.7 / np.hypot(*backward[:2]), abs=1e-4)
        floor = floor_height(torch.zeros(3, 1)).item()
        assert depth[2] == pytest.approx(distance - floor / backward[2], abs=2e-3)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_hits_lie_on_the_surface_and_normals_are_its_gradient(shape):
    rng = np.random.default_rng(0)
    origin = rng.normal(size=(3, 5000))
    origin *= 10 / np.linalg.norm(origin, axis=0)
    direction = rng.uniform(-1.2, 1.2, (3, 5000)) - origin
    t = HITS[shape](torch.tensor(origin), torch.tensor(direction)).numpy()
    assert (~np.isfinite(t)).sum() > 500
    there = np.isfinite(t)
    points = (origin + np.where(there, t, 0) * direction)[:, there]
    assert np.abs(excess(SHAPES[shape], points.T)).max() < 0.05  # of an edge of width 1/4 or 1/10: 0.004 in space
    step = 1e-6
    gradient = [excess(SHAPES[shape], points.T + d) - excess(SHAPES[shape], points.T - d) for d in step * np.eye(3)]
    gradient /= np.linalg.norm(gradient, axis=0)
    normals = NORMALS[shape](torch.tensor(points)).numpy()
    normals /= np.linalg.norm(normals, axis=0)
    np.testing.assert_allclose(normals, gradient, atol=1e-5)
    cosine = (normals * direction[:, there]).sum(0) / np.linalg.norm(direction[:, there], axis=0)
    assert (cosine < 0).mean() > 0.995  # the near side; rays that only graze an edge may stop just behind it
    assert cosine.max() < 0.2
    # no earlier point of the ray is inside
    before = origin[:, there, None] + (t[there, None] * np.linspace(0.8, 0.9999, 200)) * direction[:, there, None]
    assert excess(SHAPES[shape], np.moveaxis(before, 0, -1)).min() > -0.01


def test_world_normals_are_the_slopes_of_the_depth():
    """Finite differences of the depth image against the normals, away from silhouettes."""
    scene = Scene((one("sphere", x=1.5, y=-1.0), one("cube", x=-1.5, y=1.0), one("cylinder", x=-1.0, y=-2.0)))
    width, height = 240, 160
    truth = annotate([scene], width=width, height=height)
    ids, depth = truth.instances[0].numpy(), truth.depth[0].double().numpy()
    points = scene.camera.location + depth[..., None] * scene.camera.rays(width, height)
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    measured = np.cross(down, across)
    measured /= np.linalg.norm(measured, axis=-1, keepdims=True)
    bodies = Bodies.of(SceneBatch.of([scene]))
    for slot in range(3):
        whole = np.stack([np.roll(ids == slot, (i, j), (0, 1)) for i in (-2, 0, 2) for j in (-2, 0, 2)]).all(0)
        inner = whole[1:-1, 1:-1]
        at = torch.tensor(points[1:-1, 1:-1][inner].T, dtype=torch.float32)
        owner = torch.full((at.shape[1],), int(bodies.number[0, slot]))
        expected = bodies.normals(owner, at).numpy().T
        cosine = (measured[inner] * expected).sum(-1)
        assert len(cosine) > 100
        assert np.quantile(cosine, 0.1) > 0.995  # differences smear the rounded edges
        assert np.median(cosine) > 0.9995


def test_the_nearer_object_hides_the_farther():
    near, far = one("cube", x=1.5, y=-1.3), one("sphere", x=-0.1, y=0.1)
    for objects in ((near, far), (far, near)):
        scene = Scene(objects)
        ids = instances(scene, 96, 64)
        alone = instances(Scene((near,)), 96, 64) == 0
        assert (ids[alone] == objects.index(near)).all()
        assert (ids == objects.index(far)).sum() < (instances(Scene((far,)), 96, 64) == 0).sum()
    np.testing.assert_array_equal(picture(Scene((near, far)), 64, 64), picture(Scene((far, near)), 64, 64))


def test_a_turn_by_a_right_angle_changes_nothing():
    """Cubes have this symmetry, spheres and cylinders any."""
    for shape, turn in (("cube", np.pi / 2), ("sphere", 1.0), ("cylinder", 1.0)):
        for material in ("rubber", "metal"):
            images = [picture(Scene((one(shape, material, rotation=angle),)), 96, 64) for angle in (0.3, 0.3 + turn)]
            assert np.abs(images[0].astype(int) - images[1]).max() <= 1


def test_ground_depth_agrees_with_single_rays():
    scenes = [sampled(0), sampled(1)]
    view = View.of(SceneBatch.of(scenes).camera, 24, 16, ASPECT)
    x, y = view.slopes(torch.arange(24) + 0.5, torch.arange(16) + 0.5)
    depth = ground_depth(*view[:4], x, y)
    for number, scene in enumerate(scenes):
        rays = torch.tensor(scene.camera.rays(24, 16).reshape(-1, 3).T, dtype=torch.float32)
        origin = torch.tensor(scene.camera.location)[:, None].expand_as(rays)
        t = ground_hit(origin, rays)
        seen = t < FAR
        assert seen.float().mean() > 0.9
        torch.testing.assert_close(depth[number].flatten()[seen], t[seen], rtol=1e-4, atol=1e-3)
        points = (origin + t * rays)[:, seen]
        torch.testing.assert_close(points[2], floor_height(points), atol=0.02, rtol=0)
        slope = (floor_height(points + torch.tensor([[1e-2], [0], [0]])) - floor_height(points)) / 1e-2
        normals = ground_normal(points)
        assert ((-normals[0] / normals[2]) - slope).abs().quantile(0.9) < 0.06  # smoothed between the pieces


def test_mirror_rays_find_what_ray_marching_finds():
    rng = np.random.default_rng(0)
    scene = Scene((one("sphere", "metal"), one("cube", x=2.0, y=0.3), one("cylinder", x=-1.8, y=-1.2)))
    bodies = Bodies.of(SceneBatch.of([scene]))
    leaving = int(bodies.number[0, 0])
    normals = rng.normal(size=(3, 400))
    normals /= np.linalg.norm(normals, axis=0)
    origin = np.array(scene.objects[0].coords)[:, None] + 0.7 * normals
    direction = normals + 0.3 * rng.normal(size=(3, 400))
    direction /= np.linalg.norm(direction, axis=0)
    tensors = (torch.tensor(part, dtype=torch.float32) for part in (origin, direction))
    t, owner = nearest_hit(bodies, *tensors, torch.full((400,), leaving))
    steps = np.arange(0.01, 4, 0.01)
    line = origin.T[:, None] + steps[:, None] * direction.T[:, None]
    for slot in (1, 2):
        hit = inside(scene.objects[slot], line)
        found = (owner == bodies.number[0, slot]).numpy()
        assert (found == hit.any(-1)).mean() > 0.98
        both = found & hit.any(-1)
        assert both.sum() > 15
        np.testing.assert_allclose(t.numpy()[both], steps[hit[both].argmax(-1)], atol=0.03)
    assert (owner != leaving).all()
    assert (owner == GROUND).any()


def test_shadows_fall_where_an_object_hides_the_lamp():
    rng = np.random.default_rng(0)
    agree = []
    for seed in range(4):
        scene = sampled(seed)
        bodies = Bodies.of(SceneBatch.of([scene]))
        points = np.stack([*rng.uniform(-4, 4, (2, 300)), np.full(300, 0.02)])
        free = ~np.any([inside(obj, points.T) for obj in scene.objects], axis=0)
        points = torch.tensor(points[:, free], dtype=torch.float32)
        count = points.shape[1]
        lamps = SceneBatch.of([scene]).lamps.permute(2, 1, 0).expand(-1, -1, count)
        lights = lights_at(points, lamps)
        owner = torch.full((count,), GROUND)
        share = (block(lights, points, owner, torch.zeros_like(owner), bodies).irradiance / lights.irradiance).numpy()
        along = np.arange(0.01, 6, 0.02)
        for light in range(4):
            line = points.numpy().T[:, None] + along[:, None] * lights.direction[:, light].numpy().T[:, None]
            hidden = np.any([inside(obj, line).any(-1) for obj in scene.objects], axis=0)
            sure = np.abs(share[light] - 0.5) > 0.25
            agree.append((hidden == (share[light] < 0.5))[sure])
    agree = np.concatenate(agree)
    assert agree.mean() > 0.98  # edges are rounded in the shapes, not quite so in the shadows
    assert len(agree) > 3000


def test_shadows_are_as_soft_as_the_lamps_are_large():
    """In the penumbra, against the share of 5x5 points of each square lamp that no object hides."""
    rng = np.random.default_rng(0)
    steps = (np.arange(5) + 0.5) / 5 - 0.5
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    errors = []
    for seed in range(3):
        scene = sampled(seed)
        batch = SceneBatch.of([scene])
        points = np.stack([*rng.uniform(-3.5, 3.5, (2, 400)), np.full(400, 0.02)], axis=1)
        points = points[~np.any([inside(obj, points) for obj in scene.objects], axis=0)]
        lit = torch.tensor(points.T, dtype=torch.float32)
        lights = lights_at(lit, batch.lamps.permute(2, 1, 0).expand(-1, -1, len(points)))
        owner = torch.full((len(points),), GROUND)
        reached = block(lights, lit, owner, torch.zeros_like(owner), Bodies.of(batch)).irradiance / lights.irradiance
        for share, (name, side) in zip(reached[:3].numpy(), (("key", 0.5), ("fill", 0.5), ("back", 1.0)), strict=True):
            lamp = np.array(scene.lamps[name])
            facing = lamp / np.linalg.norm(lamp)
            level = np.cross(facing, [0, 0, 1]) / np.hypot(*facing[:2])
            square = lamp + side * grid @ np.stack([level, np.cross(facing, level)])
            half_lit = (share > 0.02) & (share < 0.98)
            start = points[half_lit][:, None, None]
            line = start + np.linspace(0, 0.85, 160)[:, None] * (square[:, None] - start)
            hidden = np.any([inside(obj, line).any(-1) for obj in scene.objects], axis=0)
            errors.extend(share[half_lit] - (1 - hidden.mean(1)))
    assert len(errors) > 150
    assert np.abs(errors).mean() < 0.09
    assert abs(np.mean(errors)) < 0.03


@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_metal_mirrors_its_neighbour(material):
    near = {"shape": "cube", "material": material, "x": 1.3, "y": 0.9, "rotation": 0.0}
    red, green = (Scene((one("sphere", "metal"), one(color=color, **near))) for color in ("red", "green"))
    change = picture(red, 96, 64).astype(int) - picture(green, 96, 64)
    mirrored = change[instances(red, 96, 64) == 0]
    assert mirrored[:, 0].max() > 16  # the floor between them, which both tint, makes 13
    assert mirrored[:, 1].min() < -8
    assert (np.abs(mirrored).max(-1) <= 1).mean() > 0.3  # most of the sphere does not face it


def test_looking_for_shadows_in_their_boxes_only_loses_none():
    scenes = [sampled(seed) for seed in range(5)]
    batch = SceneBatch.of(scenes)
    bodies, view = Bodies.of(batch), View.of(batch.camera, 48, 32, ASPECT)
    x, y = view.slopes(torch.arange(48) + 0.5, torch.arange(32) + 0.5)
    depth = ground_depth(*view[:4], x, y)
    location, right, up, backward = (axis[..., None, None] for axis in view[:4])
    points = (location + depth * (right * x + up * y[:, None] - backward)).flatten(1)
    scene = torch.arange(5).repeat_interleave(48 * 32)
    lamps = batch.lamps.permute(2, 1, 0)
    lights = lights_at(points, lamps[:, :, scene])
    inside_boxes = block_ground(lights, points, bodies, view, lamps).irradiance
    everywhere = block(lights, points, torch.full_like(scene, GROUND), scene, bodies).irradiance
    # behind an object the ground is not seen, and there the boxes may end
    seen = annotate(batch, width=48, height=32).instances.flatten() == GROUND
    torch.testing.assert_close(inside_boxes[:, seen], everywhere[:, seen], atol=2e-3, rtol=0)
    assert (everywhere[:, seen] < 0.5 * lights.irradiance[:, seen]).any()


def test_a_shadow_darkens_the_ground():
    obj = one("cylinder")
    width, height = 96, 64
    scene = Scene((obj,))
    bare, shaded = (picture(s, width, height).astype(float).sum(-1) for s in (Scene(()), scene))
    rays = scene.camera.rays(width, height)
    points = scene.camera.location + rays * (scene.camera.location[2] / -rays[..., 2:])
    to_lamp = np.array(scene.lamps["key"]) - points
    line = points[..., None, :] + np.linspace(0, 0.8, 200)[:, None] * to_lamp[..., None, :]
    hidden = inside(obj, line).any(-1)
    ground = (instances(scene, width, height) == -1) & (np.abs(points[..., :2]).max(-1) < 5)
    ratio = shaded / bare
    assert (ground & hidden).sum() > 30
    assert ratio[ground & hidden].mean() < ratio[ground & ~hidden].mean() - 0.03
    assert ratio[ground].min() < 0.75  # where several lights are hidden
    assert ratio[ground].max() < 1.1


def test_irradiance_of_the_lamps_is_the_integral_over_their_squares():
    """The lamps as points, against a fine grid of emitting points on each square; the measured table at the origin."""
    lamps = torch.tensor([NOMINAL_LAMPS[name] for name in ("key", "fill", "back")], dtype=torch.float64)
    point = torch.tensor([[0.0], [0.0], [0.0]], dtype=torch.float64)
    lights = lights_at(point.float(), lamps.T[..., None].float())
    received = (lights.irradiance * lights.direction[2])[:, 0]
    np.testing.assert_allclose(received, [0.189, 0.070, 0.265, 0.400], atol=0.001)  # measured, un-jittered
    for light, (side, radiance) in enumerate(((0.5, 100.0), (0.5, 30.0), (1.0, 12.5))):
        facing = -lamps[light] / lamps[light].norm()
        level = torch.linalg.cross(facing, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        level /= level.norm()
        steps = (torch.arange(40, dtype=torch.float64) + 0.5) / 40 * side - side / 2
        square = torch.cartesian_prod(steps, steps) @ torch.stack([level, torch.linalg.cross(facing, level)])
        away = lamps[light] + square
        distance = away.norm(dim=1)
        total = radiance * (side / 40) ** 2 * ((-away @ facing) * away[:, 2] / distance**4).sum()
        assert received[light] == pytest.approx(float(total), rel=0.01)


@pytest.mark.parametrize("width", [0.05, 0.19, 0.35])
def test_a_rough_mirror_sends_out_no_more_than_it_receives(width):
    """White furnace: under light of radiance 1 from everywhere a surface of reflectance 1 shows no more than 1."""
    rng = torch.Generator().manual_seed(0)
    count = 400_000
    height = torch.rand(count, generator=rng)
    turn = 2 * torch.pi * torch.rand(count, generator=rng)
    flat = (1 - height**2).sqrt()

    for tilt in (0.0, 0.5, 1.0):
        view = torch.tensor([[np.sin(tilt)], [0.0], [np.cos(tilt)]], dtype=torch.float32)
        white = torch.tensor([[0.0], [0.0], [1.0]])
        directions = torch.stack([flat * turn.cos(), flat * turn.sin(), height])[:, None].expand(-1, 4, -1)
        only_sun = torch.tensor([0.0, 0, 0, 2 * torch.pi])[:, None].expand(-1, count)  # 1 over the density
        lights = Lights(directions, only_sun, torch.zeros(4, count))
        lobe = [(1.0, torch.full((4, count), width**2))]
        total = highlight(view.expand(-1, count), white.expand(-1, count), lights, lobe)[0].mean().item()
        assert 0.8 < total < 1.03


def test_fresnel():
    """Known values: ((n - 1)/(n + 1))^2 head on, everything at grazing light, never falling in between."""
    cosine = torch.linspace(0, 1, 101)
    for index in (1.2, 1.4):
        share = fresnel(cosine, index)
        assert share[-1] == pytest.approx(((index - 1) / (index + 1)) ** 2, rel=1e-4)
        assert share[0] == pytest.approx(1)
        assert (share.diff() <= 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_metal_differs_from_rubber(shape):
    looks = {}
    for material in ("rubber", "metal"):
        scene = Scene((one(shape, material, "blue"),))
        image = picture(scene, 240, 160).astype(float).mean(-1)
        looks[material] = image[instances(scene, 240, 160) == 0]
    # highlights and the black sky: more contrast on metal
    assert looks["metal"].std() > 1.1 * looks["rubber"].std()
    assert looks["metal"].max() > looks["rubber"].max() + 10
    assert np.abs(looks["metal"] - looks["rubber"]).mean() > 8


def test_a_picture_depends_on_its_scene_alone():
    scenes = [sampled(seed, (0, 10)) for seed in range(12)] + [Scene(())]
    together = render(scenes, width=64, height=64)
    assert together.dtype == torch.uint8
    assert together.shape == (13, 64, 64, 3)
    assert together.is_contiguous()
    threads = torch.get_num_threads()
    try:
        for size, used in ((1, 1), (5, 2)):
            torch.set_num_threads(used)
            parts = [render(scenes[start : start + size], width=64, height=64) for start in range(0, 13, size)]
            assert torch.equal(torch.cat(parts), together)
    finally:
        torch.set_num_threads(threads)
    assert {part.device.type for part in SceneBatch.of(scenes).to("meta")} == {"meta"}
    padded = render(SceneBatch.of(scenes, max_objects=16), width=64, height=64)
    assert torch.equal(padded, together)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(render(SceneBatch.of(scenes).part(order), width=64, height=64), together[order])
    truth = annotate(scenes, width=64, height=64)
    for number, scene in enumerate(scenes):
        alone = annotate([scene], width=64, height=64)
        assert torch.equal(truth.instances[number], alone.instances[0])
        assert torch.equal(truth.depth[number], alone.depth[0])
        assert torch.equal(truth.visible_pixels[number, : len(scene.objects)], alone.visible_pixels[0])
        assert (truth.visible_pixels[number, len(scene.objects) :] == 0).all()
    moved = replace(scenes[0], camera=Camera((7.0, -6.5, 5.3)))
    assert not torch.equal(render([moved], width=64, height=64)[0], together[0])


def test_the_ground_alone_is_the_picture_where_no_object_is():
    scenes = [Scene(()), sampled(1), sampled(2)]
    ground = render_ground(scenes, width=96, height=64).int()
    whole = render(scenes, width=96, height=64).int()
    seen = annotate(scenes, width=192, height=128).instances.reshape(3, 64, 2, 96, 2).amax((2, 4)) >= 0
    near = torch.nn.functional.max_pool2d(seen.float()[:, None], 5, stride=1, padding=2)[:, 0] > 0
    assert torch.equal(ground[0], whole[0])
    assert torch.equal(ground[~near], whole[~near])
    assert (ground - whole)[seen].abs().float().mean() > 10
    assert (ground[0] - ground[1]).abs().max() > 20  # shadows are there


@pytest.mark.parametrize("shape", SHAPES)
def test_behind_and_beside_the_camera_nothing_is_seen(shape):
    camera = np.array(NOMINAL_CAMERA.location)
    right, _, backward = NOMINAL_CAMERA.axes()
    for shift in (2 * backward, 20 * backward, 1.0 * right, 3 * right - 0.1 * backward):
        x, y, z = camera + shift
        scene = Scene((replace(one(shape, "metal"), coords=(float(x), float(y), float(z))), one("cube")))
        truth = annotate([scene], width=24, height=16)
        assert truth.visible_pixels[0, 0] == 0
        assert truth.visible_pixels[0, 1] == (instances(Scene((one("cube"),)), 24, 16) == 0).sum()
        assert picture(scene, 24, 16).shape == (16, 24, 3)


def test_a_square_picture_is_the_squeezed_view():
    scene = sampled(3)
    wide = Image.fromarray(picture(scene, 480, 320, samples=1)).resize((64, 64), Image.Resampling.BOX)
    square = picture(scene, 64, 64, samples=3)
    assert np.abs(np.asarray(wide).astype(float) - square).mean() < 2


@pytest.mark.parametrize("count", [0, 1])
def test_small_sizes_and_empty_scenes(count):
    scene = Scene((one(),) * count)
    assert picture(scene, 1, 1).shape == (1, 1, 3)
    assert picture(scene, 5, 3, samples=1).shape == (3, 5, 3)
    truth = annotate([scene], width=30, height=20)
    assert (truth.instances >= 0).any() == bool(count)
    assert truth.visible_pixels.shape == (1, count)
    assert torch.isfinite(truth.depth).all()


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(InputError, match="at least one scene"):
        render([], width=8, height=8)
    with pytest.raises(InputError, match="at least 1x1"):
        render([Scene(())], width=0, height=8)
    with pytest.raises(InputError, match="at least 1 sample"):
        render([Scene(())], width=8, height=8, samples=0)
    with pytest.raises(InputError, match="at most 1 objects"):
        SceneBatch.of([Scene((one(), one(x=2.0)))], max_objects=1)
    with pytest.raises(InputError, match="pink"):
        SceneBatch.of([Scene((one(color="pink"),))])
    batch = SceneBatch.of([Scene((one(),))])
    with pytest.raises(InputError, match="at least one scene"):
        render(batch.part(slice(0)), width=8, height=8)
    with pytest.raises(InputError, match=r"in float32, got .*bfloat16"):
        annotate(batch._replace(centre=batch.centre.bfloat16()), width=8, height=8)
    with pytest.raises(InputError, match="at most 128 objects"):
        annotate(SceneBatch.of([Scene(())], max_objects=129), width=8, height=8)
    for aspect in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match="aspect > 0"):
            render(batch, width=8, height=8, aspect=aspect)


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (Scene((one(x=np.nan),)), "scene 1: expected finite numbers in centre"),
        (Scene((one(rotation=np.nan),)), "scene 1: expected finite numbers in yaw"),
        (Scene((), Camera((7.0, np.inf, 5.0))), "scene 1: expected finite numbers in camera"),
        (Scene((), lamps=NOMINAL_LAMPS | {"key": (np.nan, 0.0, 1.0)}), "scene 1: expected finite numbers in lamps"),
        (Scene((), Camera((0.0, 0.0, 9.0))), "scene 1: a camera straight above the origin"),
        (Scene((), lamps={"key": (1.0, 2.0, 3.0), "back": (0.0, 0.0, 5.0)}), "'fill' is missing"),
    ],
)
def test_scenes_without_a_picture_are_refused(scene, words):
    with pytest.raises(InputError, match=words):
        SceneBatch.of([Scene(()), scene])


def test_what_torch_is_set_to_changes_nothing():
    """Neither its default type nor gradients."""
    scenes = [Scene((one("cube", "metal"), one(x=2.0), one("cylinder", y=2.0)))]
    lamp_table.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        batch = SceneBatch.of(scenes)
        picture, truth = render(batch, width=24, height=16), annotate(batch, width=24, height=16)
    finally:
        torch.set_default_dtype(before)
    learned = batch._replace(color=batch.color.clone().requires_grad_())
    assert torch.equal(render(learned, width=24, height=16), picture)
    lamp_table.cache_clear()
    assert torch.equal(render(scenes, width=24, height=16), picture)
    assert truth.depth.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(annotate(scenes, width=24, height=16), truth, strict=True))


def test_pixels_of_boxes():
    boxes = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 9], [4, 0, 2, 3], [0, 0, 1, 1]])
    assert torch.stack(pixels_of(boxes)).T.tolist() == [[0, 1, 2], [0, 2, 2], [0, 1, 3], [0, 2, 3], [3, 0, 0]]
    assert all(len(part) == 0 for part in pixels_of(boxes[:0]))


def test_encoding_and_softening():
    levels = torch.tensor([0.0, 0.0031308, 0.2140, 0.5, 1.0])
    srgb = encode(levels[None, None, None].expand(3, -1, -1, -1))[0, 0, :, 0]
    np.testing.assert_allclose(srgb, [0, 10, 127, 188, 255], atol=1)
    image = torch.rand(3, 2, 5, 4)
    torch.testing.assert_close(soften(image).mean(), image.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(soften(torch.ones(3, 1, 2, 2)), torch.ones(3, 1, 2, 2))
    point = torch.zeros(3, 1, 5, 5)
    point[:, :, 2, 2] = 144
    weights = torch.tensor([0.0, 1, 10, 1, 0])
    torch.testing.assert_close(soften(point), (weights[:, None] * weights).expand(3, 1, -1, -1))


def test_the_empty_ground_has_the_measured_brightness():
    image = picture(Scene(()), 320, 240, aspect=320 / 240).astype(int)
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
    scenes = [sample_scene(rng, objects=(3, 6)) for _ in range(120)]
    images = render(scenes, width=96, height=64).numpy()
    ids = annotate(scenes, width=96, height=64).instances.numpy()
    for number, scene in enumerate(scenes):
        for index, obj in enumerate(scene.objects):
            x, y, _ = scene.camera.project(obj.coords, 96, 64).astype(int)
            if 0 <= x < 96 and 0 <= y < 64 and ids[number, y, x] == index:
                seen[obj.color, obj.material == "metal"].append(images[number, y, x])
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
        image = picture(scene, 96, 64)
        error = np.abs(image - real).mean(-1)
        errors.append(error.mean())
        ground_errors.append(error[instances(scene, 96, 64) < 0].mean())
        # shifted by a pixel, the picture fits less well: camera and silhouettes are right
        for axis in (0, 1):
            for shift in (-1, 1):
                moved = np.roll(image, shift, axis)
                assert np.abs(moved - real)[1:-1, 1:-1].mean() > 1.1 * error[1:-1, 1:-1].mean()
    assert np.mean(errors) < 2.5
    assert np.mean(ground_errors) < 1.5
