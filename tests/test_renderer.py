"""Geometry against ray marching, shadows against the line to the lamp, looks against measurements and real images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from setpred.errors import InputError
from setpred.rendering.bodies import GROUND, Bodies
from setpred.rendering.camera import ASPECT, NOMINAL_CAMERA, Camera
from setpred.rendering.ground import FAR, floor_height, ground_depth, ground_hit, ground_normal
from setpred.rendering.lighting import Lights, block, block_ground, lamp_table, lights_at
from setpred.rendering.materials import fresnel, highlight
from setpred.rendering.renderer import annotate, encode, render, render_ground, soften
from setpred.rendering.sampling import SceneRules
from setpred.rendering.scenes import HALF_SIZE, NOMINAL_LAMPS, SHAPES, Scene, SceneBatch, SceneObject
from setpred.rendering.shapes import HITS, NORMALS
from setpred.rendering.visibility import View, nearest_hit


def one(shape="sphere", material="rubber", color="gray", size="large", x=0.0, y=0.0, rotation=0.4) -> SceneObject:
    return SceneObject((x, y, HALF_SIZE[size]), rotation, material, color, shape, size)


def sampled(seed: int, objects=(3, 10)) -> Scene:
    return SceneRules(objects=objects).sample(np.random.default_rng(seed))


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


def gradient(shape: str, q: np.ndarray) -> np.ndarray:
    """Unit normals `[..., 3]` of a unit shape by central differences."""
    slopes = [excess(shape, q + d) - excess(shape, q - d) for d in 1e-6 * np.eye(3)]
    return np.stack(slopes, -1) / np.linalg.norm(slopes, axis=0)[..., None]


def to_unit(obj: SceneObject) -> np.ndarray:
    """The turn `[3, 3]` from the world to an object's axes."""
    c, s = np.cos(obj.rotation), np.sin(obj.rotation)
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def inside(obj: SceneObject, points: np.ndarray) -> np.ndarray:
    """Whether world points `[..., 3]` are in an object and above the floor that it is sunk into."""
    q = (points - obj.coords) @ to_unit(obj).T / HALF_SIZE[obj.size]
    return (excess(obj.shape, q) < 0) & (points[..., 2] > floor_height(torch.tensor(obj.coords)[:, None]).item())


def on_floor(scene: Scene, count: int, reach: float, rng: np.random.Generator) -> np.ndarray:
    """Random points `[n, 3]` just above the floor, outside the objects."""
    points = np.stack([*rng.uniform(-reach, reach, (2, count)), np.full(count, 0.02)], axis=1)
    return points[~hidden(scene, points)]


def hidden(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Whether points `[..., 3]` are inside an object of the scene."""
    return np.any([inside(obj, points) for obj in scene.objects], axis=0)


def lit(scene: Scene, points: np.ndarray) -> tuple[Lights, np.ndarray]:
    """The lights at points of the ground `[n, 3]`, and the share of each that passes the objects `[4, n]`."""
    batch, at = SceneBatch.of([scene]), torch.tensor(points.T, dtype=torch.float32)
    lights = lights_at(at, batch.lamps.permute(2, 1, 0).expand(-1, -1, len(points)))
    owner = torch.full((len(points),), GROUND)
    passed = block(lights, at, owner, torch.zeros_like(owner), Bodies.of(batch))
    return lights, (passed.irradiance / lights.irradiance).numpy()


@pytest.mark.parametrize("seed", range(4))
def test_instances_and_depth_agree_with_ray_marching(seed):
    scene = sampled(seed)
    truth = annotate([scene], width=36, height=24)
    ids, depth = truth.instances[0].numpy(), truth.depth[0].numpy()
    steps = np.arange(5, 17, 0.015)
    points = scene.camera.location + steps[:, None] * scene.camera.rays(36, 24)[:, :, None]
    hits = np.array([inside(obj, points) for obj in scene.objects])
    first = np.where(hits.any(-1), hits.argmax(-1), len(steps))
    slow_ids = np.where(hits.any((0, -1)), first.argmin(0), -1)
    assert set(np.unique(slow_ids)) >= set(range(len(scene.objects)))
    assert (ids != slow_ids).mean() < 0.005  # the steps miss rays that only graze
    same = (ids == slow_ids) & (ids >= 0)
    assert np.quantile(np.abs(depth - steps[first.min(0) % len(steps)] + 0.0075)[same], 0.99) < 0.008
    ground = (scene.camera.location + depth[..., None] * scene.camera.rays(36, 24))[ids < 0]
    assert np.abs(ground[:, 2] - floor_height(torch.tensor(ground.T).float()).numpy()).max() < 0.02
    np.testing.assert_array_equal(truth.visible_pixels[0], [(ids == k).sum() for k in range(len(scene.objects))])


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=SHAPES)
def test_hits_are_on_the_surface_and_normals_are_its_gradient(index):
    rng, shape = np.random.default_rng(0), SHAPES[index]
    origin = rng.normal(size=(3, 5000))
    origin *= 10 / np.linalg.norm(origin, axis=0)
    direction = rng.uniform(-1.2, 1.2, (3, 5000)) - origin
    t = HITS[index](torch.tensor(origin), torch.tensor(direction)).numpy()
    there = np.isfinite(t)
    assert (~there).sum() > 500
    origin, direction, t = origin[:, there], direction[:, there], t[there]
    points = origin + t * direction
    assert np.abs(excess(shape, points.T)).max() < 0.05  # of an edge of width 1/4 or 1/10: 0.004 in space
    normals = NORMALS[index](torch.tensor(points)).numpy()
    normals /= np.linalg.norm(normals, axis=0)
    np.testing.assert_allclose(normals.T, gradient(shape, points.T), atol=1e-5)
    cosine = (normals * direction).sum(0) / np.linalg.norm(direction, axis=0)
    assert (cosine < 0).mean() > 0.995  # the near side; rays that only graze an edge may stop just behind it
    assert cosine.max() < 0.2
    before = origin[..., None] + t[:, None] * np.linspace(0.8, 0.9999, 200) * direction[..., None]
    assert excess(shape, np.moveaxis(before, 0, -1)).min() > -0.01  # no earlier point of the ray is inside


def test_world_normals_are_the_gradients_at_the_visible_points():
    scene = Scene((one("sphere", x=1.5, y=-1.0), one("cube", x=-1.5, y=1.0), one("cylinder", x=-1.0, y=-2.0)))
    truth = annotate([scene], width=60, height=40)
    bodies = Bodies.of(SceneBatch.of([scene]))
    points = scene.camera.location + truth.depth[0].numpy()[..., None] * scene.camera.rays(60, 40)
    for slot, obj in enumerate(scene.objects):
        at = points[truth.instances[0].numpy() == slot]
        assert len(at) > 50
        normals = bodies.normals(torch.full((len(at),), int(bodies.number[0, slot])), torch.tensor(at.T).float())
        expected = gradient(obj.shape, (at - obj.coords) @ to_unit(obj).T / HALF_SIZE[obj.size]) @ to_unit(obj)
        assert (normals.numpy().T * expected).sum(-1).min() > 0.999


def test_symmetries():
    """The order of objects, and turns by the shapes' symmetries, change nothing."""
    objects = one("cube", x=1.5, y=-1.3), one("sphere", "metal", x=-0.1, y=0.1)
    np.testing.assert_array_equal(*(picture(Scene(order), 64, 64) for order in (objects, objects[::-1])))
    for shape, turn in (("cube", np.pi / 2), ("sphere", 1.0), ("cylinder", 1.0)):
        for material in ("rubber", "metal"):
            images = [picture(Scene((one(shape, material, rotation=angle),)), 96, 64) for angle in (0.3, 0.3 + turn)]
            assert np.abs(images[0].astype(int) - images[1]).max() <= 1


def test_ground_depth_agrees_with_single_rays():
    scenes = [sampled(0), sampled(1)]
    view = View.of(SceneBatch.of(scenes).camera, 24, 16, ASPECT)
    depth = ground_depth(*view[:4], *view.centres())
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


def test_mirror_rays_agree_with_ray_marching():
    rng = np.random.default_rng(0)
    scene = Scene((one("sphere", "metal"), one("cube", x=2.0, y=0.3), one("cylinder", x=-1.8, y=-1.2)))
    bodies = Bodies.of(SceneBatch.of([scene]))
    leaving = int(bodies.number[0, 0])
    normals = rng.normal(size=(400, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    origin = scene.objects[0].coords + 0.7 * normals
    direction = normals + 0.3 * rng.normal(size=(400, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    tensors = (torch.tensor(part.T, dtype=torch.float32) for part in (origin, direction))
    t, owner = nearest_hit(bodies, *tensors, torch.full((400,), leaving))
    steps = np.arange(0.01, 4, 0.01)
    line = origin[:, None] + steps[:, None] * direction[:, None]
    for slot in (1, 2):
        hit = inside(scene.objects[slot], line)
        found = (owner == bodies.number[0, slot]).numpy()
        assert (found == hit.any(-1)).mean() > 0.98
        both = found & hit.any(-1)
        assert both.sum() > 15
        np.testing.assert_allclose(t.numpy()[both], steps[hit[both].argmax(-1)], atol=0.03)
    assert (owner != leaving).all()
    assert (owner == GROUND).any()


def test_shadows_fall_where_an_object_hides_the_light():
    rng, agree = np.random.default_rng(0), []
    along = np.arange(0.01, 6, 0.02)[:, None]
    for scene in map(sampled, range(4)):
        points = on_floor(scene, 300, 4, rng)
        lights, share = lit(scene, points)
        for light in range(4):
            line = points[:, None] + along * lights.direction[:, light].numpy().T[:, None]
            sure = np.abs(share[light] - 0.5) > 0.25
            agree.extend((hidden(scene, line).any(-1) == (share[light] < 0.5))[sure])
    assert np.mean(agree) > 0.98  # edges are rounded in the shapes, not quite so in the shadows
    assert len(agree) > 3000


def test_shadows_are_as_soft_as_the_lamps_are_large():
    """In the penumbra, against the share of 5x5 points of each square lamp that no object hides."""
    rng, errors = np.random.default_rng(0), []
    steps = (np.arange(5) + 0.5) / 5 - 0.5
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    for scene in map(sampled, range(3)):
        points = on_floor(scene, 400, 3.5, rng)
        shares = lit(scene, points)[1][:3]
        for share, (name, side) in zip(shares, (("key", 0.5), ("fill", 0.5), ("back", 1.0)), strict=True):
            lamp = np.array(scene.lamps[name])
            facing = lamp / np.linalg.norm(lamp)
            level = np.cross(facing, [0, 0, 1]) / np.hypot(*facing[:2])
            square = lamp + side * grid @ np.stack([level, np.cross(facing, level)])
            half_lit = (share > 0.02) & (share < 0.98)
            start = points[half_lit][:, None, None]
            line = start + np.linspace(0, 0.85, 160)[:, None] * (square[:, None] - start)
            errors.extend(share[half_lit] - (1 - hidden(scene, line).any(-1).mean(1)))
    assert len(errors) > 150
    assert np.abs(errors).mean() < 0.09
    assert abs(np.mean(errors)) < 0.03


def test_the_boxes_of_shadows_contain_them():
    batch = SceneBatch.of([sampled(seed) for seed in range(5)])
    bodies, view = Bodies.of(batch), View.of(batch.camera, 48, 32, ASPECT)
    x, y = view.centres()
    location, right, up, backward = (axis[..., None, None] for axis in view[:4])
    points = (location + ground_depth(*view[:4], x, y) * (right * x + up * y[:, None] - backward)).flatten(1)
    scene = torch.arange(5).repeat_interleave(48 * 32)
    lamps = batch.lamps.permute(2, 1, 0)
    lights = lights_at(points, lamps[:, :, scene])
    inside_boxes = block_ground(lights, points, bodies, view, lamps).irradiance
    everywhere = block(lights, points, torch.full_like(scene, GROUND), scene, bodies).irradiance
    seen = annotate(batch, width=48, height=32).instances.flatten() == GROUND  # behind objects the boxes may end
    torch.testing.assert_close(inside_boxes[:, seen], everywhere[:, seen], atol=2e-3, rtol=0)
    assert (everywhere[:, seen] < 0.5 * lights.irradiance[:, seen]).any()


@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_metal_mirrors_its_neighbour(material):
    near = {"shape": "cube", "material": material, "x": 1.3, "y": 0.9, "rotation": 0.0}
    red, green = (Scene((one("sphere", "metal"), one(color=color, **near))) for color in ("red", "green"))
    change = picture(red, 96, 64).astype(int) - picture(green, 96, 64)
    mirrored = change[instances(red, 96, 64) == 0]
    assert mirrored[:, 0].max() > 16  # the floor between them, which both tint, makes 13
    assert mirrored[:, 1].min() < -8
    assert (np.abs(mirrored).max(-1) <= 1).mean() > 0.3  # most of the sphere does not face it


def test_irradiance_of_the_lamps_is_the_integral_over_their_squares():
    """Point lamps against a fine grid of emitting points on each square, and against the table at the origin."""
    lamps = torch.tensor([NOMINAL_LAMPS[name] for name in ("key", "fill", "back")], dtype=torch.float64)
    lights = lights_at(torch.zeros(3, 1), lamps.T[..., None].float())
    received = (lights.irradiance * lights.direction[2])[:, 0]
    np.testing.assert_allclose(received, [0.189, 0.070, 0.265, 0.400], atol=0.001)  # measured without jitter
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for light, (side, radiance) in enumerate(((0.5, 100.0), (0.5, 30.0), (1.0, 12.5))):
        facing = -lamps[light] / lamps[light].norm()
        level = torch.nn.functional.normalize(torch.linalg.cross(facing, up), dim=0)
        steps = (torch.arange(40, dtype=torch.float64) + 0.5) / 40 * side - side / 2
        square = torch.cartesian_prod(steps, steps) @ torch.stack([level, torch.linalg.cross(facing, level)])
        away = lamps[light] + square
        total = radiance * (side / 40) ** 2 * ((-away @ facing) * away[:, 2] / away.norm(dim=1) ** 4).sum()
        assert received[light] == pytest.approx(float(total), rel=0.01)


@pytest.mark.parametrize("width", [0.05, 0.19, 0.35])
def test_a_rough_mirror_reflects_at_most_what_it_receives(width):
    """White furnace: under light of radiance 1 from everywhere a surface of reflectance 1 shows at most 1."""
    rng, count = torch.Generator().manual_seed(0), 400_000
    height, turn = torch.rand(count, generator=rng), 2 * torch.pi * torch.rand(count, generator=rng)
    flat = (1 - height**2).sqrt()
    directions = torch.stack([flat * turn.cos(), flat * turn.sin(), height])[:, None].expand(-1, 4, -1)
    only_sun = torch.tensor([0.0, 0, 0, 2 * torch.pi])[:, None].expand(-1, count)  # 1 over the density
    lights, lobe = Lights(directions, only_sun, torch.zeros(4, count)), [(1.0, torch.full((4, count), width**2))]
    for tilt in (0.0, 0.5, 1.0):
        view = torch.tensor([[np.sin(tilt)], [0.0], [np.cos(tilt)]], dtype=torch.float32).expand(-1, count)
        white = torch.tensor([[0.0], [0.0], [1.0]]).expand(-1, count)
        assert 0.8 < highlight(view, white, lights, lobe)[0].mean().item() < 1.03


def test_fresnel():
    """((n - 1)/(n + 1))^2 head on, everything at grazing light, never falling in between."""
    for index in (1.2, 1.4):
        share = fresnel(torch.linspace(0, 1, 101), index)
        assert share[-1] == pytest.approx(((index - 1) / (index + 1)) ** 2, rel=1e-4)
        assert share[0] == pytest.approx(1)
        assert (share.diff() <= 1e-6).all()


def test_a_picture_depends_on_its_scene_alone():
    scenes = [sampled(seed, (0, 10)) for seed in range(12)] + [Scene(())]
    size = {"width": 64, "height": 64}
    together = render(scenes, **size)
    assert (together.dtype, together.shape, together.is_contiguous()) == (torch.uint8, (13, 64, 64, 3), True)
    threads = torch.get_num_threads()
    try:
        for step, used in ((1, 1), (5, 2)):
            torch.set_num_threads(used)
            parts = [render(scenes[start : start + step], **size) for start in range(0, 13, step)]
            assert torch.equal(torch.cat(parts), together)
    finally:
        torch.set_num_threads(threads)
    assert {part.device.type for part in SceneBatch.of(scenes).to("meta")} == {"meta"}
    assert torch.equal(render(SceneBatch.of(scenes, max_objects=16), **size), together)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(render(SceneBatch.of(scenes).part(order), **size), together[order])
    truth = annotate(scenes, **size)
    for number, scene in enumerate(scenes):
        alone, count = annotate([scene], **size), len(scene.objects)
        assert torch.equal(truth.instances[number], alone.instances[0])
        assert torch.equal(truth.depth[number], alone.depth[0])
        assert torch.equal(truth.visible_pixels[number, :count], alone.visible_pixels[0])
        assert (truth.visible_pixels[number, count:] == 0).all()
    assert not torch.equal(render([replace(scenes[0], camera=Camera((7.0, -6.5, 5.3)))], **size)[0], together[0])


def test_the_ground_alone_is_the_picture_away_from_objects():
    scenes = [Scene(()), sampled(1), sampled(2)]
    ground, full = (draw(scenes, width=96, height=64).int() for draw in (render_ground, render))
    seen = annotate(scenes, width=192, height=128).instances.reshape(3, 64, 2, 96, 2).amax((2, 4)) >= 0
    near = torch.nn.functional.max_pool2d(seen.float()[:, None], 5, stride=1, padding=2)[:, 0] > 0
    assert torch.equal(ground[0], full[0])
    assert torch.equal(ground[~near], full[~near])
    assert (ground - full)[seen].abs().float().mean() > 10
    assert (ground[0] - ground[1]).abs().max() > 20  # shadows are there


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_behind_and_beside_the_camera_are_invisible(shape):
    right, _, backward = NOMINAL_CAMERA.axes()
    for shift in (2 * backward, 20 * backward, 1.0 * right, 3 * right - 0.1 * backward):
        coords = tuple((np.array(NOMINAL_CAMERA.location) + shift).tolist())
        scene = Scene((replace(one(shape, "metal"), coords=coords), one("cube")))
        truth = annotate([scene], width=24, height=16)
        assert truth.visible_pixels[0].tolist() == [0, (instances(Scene((one("cube"),)), 24, 16) == 0).sum()]
        assert picture(scene, 24, 16).shape == (16, 24, 3)


@pytest.mark.parametrize("count", [0, 1])
def test_small_sizes_and_empty_scenes(count):
    scene = Scene((one(),) * count)
    assert picture(scene, 1, 1).shape == (1, 1, 3)
    assert picture(scene, 5, 3, samples=1).shape == (3, 5, 3)
    truth = annotate([scene], width=30, height=20)
    assert (truth.instances >= 0).any() == bool(count)
    assert truth.visible_pixels.shape == (1, count)
    assert torch.isfinite(truth.depth).all()


BATCH = SceneBatch.of([Scene((one(),))])


@pytest.mark.parametrize(
    ("scenes", "options", "words"),
    [
        ([], {}, "at least one scene"),
        (BATCH, {"width": 0}, "at least 1x1"),
        (BATCH, {"samples": 0}, "at least 1 sample"),
        *((BATCH, {"aspect": aspect}, "aspect > 0") for aspect in (0.0, np.nan, np.inf)),
        (BATCH._replace(centre=BATCH.centre.bfloat16()), {}, r"in float32, got .*bfloat16"),
        ([Scene(()), Scene((one(color="pink"),))], {}, "scene 1: expected objects of CLEVR's classes, got 'pink'"),
        ([Scene(()), Scene((one(x=np.nan),))], {}, "scene 1: expected finite numbers in centre"),
        ([Scene(()), Scene((), Camera((7.0, np.inf, 5.0)))], {}, "scene 1: expected finite numbers in camera"),
        ([Scene((), lamps={"key": (1.0, 2.0, 3.0), "back": (0.0, 0.0, 5.0)})], {}, "'fill' is missing"),
        ([Scene(()), Scene((), Camera((0.0, 0.0, 9.0)))], {}, "scene 1: a camera straight above the origin"),
    ],
)
def test_invalid_scenes_and_sizes_raise(scenes, options, words):
    with pytest.raises(InputError, match=words):
        render(scenes, **({"width": 8, "height": 8} | options))


def test_too_many_objects_raise():
    with pytest.raises(InputError, match="at most 1 objects"):
        SceneBatch.of([Scene((one(), one(x=2.0)))], max_objects=1)
    with pytest.raises(InputError, match="at most 128 objects"):
        annotate(SceneBatch.of([Scene(())], max_objects=129), width=8, height=8)


def test_torch_settings_change_nothing():
    """Neither the default type nor gradients."""
    scenes, size = [Scene((one("cube", "metal"), one(x=2.0), one("cylinder", y=2.0)))], {"width": 24, "height": 16}
    lamp_table.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        batch = SceneBatch.of(scenes)
        image, truth = render(batch, **size), annotate(batch, **size)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(render(batch._replace(color=batch.color.clone().requires_grad_()), **size), image)
    lamp_table.cache_clear()
    assert torch.equal(render(scenes, **size), image)
    assert truth.depth.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(annotate(scenes, **size), truth, strict=True))


def test_encoding_and_softening():
    levels = torch.tensor([0.0, 0.0031308, 0.2140, 0.5, 1.0])
    srgb = encode(levels[None, None, None].expand(3, -1, -1, -1))[0, 0, :, 0]
    np.testing.assert_allclose(srgb, [0, 10, 127, 188, 255], atol=1)
    torch.testing.assert_close(soften(torch.ones(3, 1, 2, 2)), torch.ones(3, 1, 2, 2))
    point = torch.zeros(3, 1, 5, 5)
    point[:, :, 2, 2] = 144
    weights = torch.tensor([0.0, 1, 10, 1, 0])
    torch.testing.assert_close(soften(point), (weights[:, None] * weights).expand(3, 1, -1, -1))


def test_the_empty_ground_has_the_measured_brightness():
    image = picture(Scene(()), 320, 240, aspect=320 / 240).astype(int)
    measured = {
        (4, 4): (105, 105, 105), (315, 4): (103, 104, 103), (160, 40): (107, 107, 107),
        (4, 120): (135, 136, 141), (160, 120): (135, 135, 134), (315, 120): (120, 119, 118),
        (4, 235): (121, 120, 119), (160, 235): (151, 148, 144), (315, 235): (151, 149, 144),
    }  # fmt: skip
    for (x, y), color in measured.items():
        np.testing.assert_allclose(image[y, x], color, atol=3)


def test_objects_have_the_measured_colours():
    measured = {  # medians at the middle of unoccluded objects: rubber, metal
        "gray": ((88, 86, 83), (69, 69, 68)), "red": ((120, 55, 53), (95, 42, 40)),
        "blue": ((60, 78, 128), (49, 66, 110)), "green": ((50, 93, 40), (41, 80, 33)),
        "brown": ((104, 78, 45), (84, 63, 35)), "purple": ((108, 58, 123), (90, 48, 106)),
        "cyan": ((58, 124, 121), (48, 108, 109)), "yellow": ((143, 136, 64), (118, 112, 52)),
    }  # fmt: skip
    seen = {(color, material): [] for color in measured for material in ("rubber", "metal")}
    rng = np.random.default_rng(0)
    scenes = [SceneRules(objects=(3, 6)).sample(rng) for _ in range(120)]
    images, ids = render(scenes, width=96, height=64).numpy(), annotate(scenes, width=96, height=64).instances.numpy()
    for number, scene in enumerate(scenes):
        for index, obj in enumerate(scene.objects):
            x, y, _ = scene.camera.project(obj.coords, 96, 64).astype(int)
            if 0 <= x < 96 and 0 <= y < 64 and ids[number, y, x] == index:
                seen[obj.color, obj.material].append(images[number, y, x])
    for (color, material), found in seen.items():
        rubber, metal = measured[color]
        expected, atol = (metal, 22) if material == "metal" else (rubber, 10)
        assert len(found) > 10
        np.testing.assert_allclose(np.median(found, axis=0), expected, atol=atol)
