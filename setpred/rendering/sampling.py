"""Random scenes by CLEVR's rules: objects, camera and lamps.

Source: the official generator and its base scene (repository facebookresearch/clevr-dataset-gen).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from setpred.errors import InputError
from setpred.rendering.camera import FOCAL, JITTER, NOMINAL_CAMERA, Camera
from setpred.rendering.scenes import COLORS, HALF_SIZE, NOMINAL_LAMPS, SHAPES, Scene, SceneObject
from setpred.rendering.shapes import HITS
from setpred.schema import CLEVR

# `right` and `behind` of the unjittered camera on the ground, which CLEVR writes into every scene
DIRECTIONS = np.array([[0.6563112735748291, 0.7544902563095093], [-0.754490315914154, 0.6563112735748291]])

# The colours of each shape. Conditions A and B test whether a model disentangles shape and colour (Johnson et al.,
# CVPR 2017, section 4.7).
_FOUR, _OTHER_FOUR = ("red", "green", "purple", "cyan"), ("gray", "blue", "brown", "yellow")
EVERY_COLOR = {shape: tuple(COLORS) for shape in SHAPES}
COGENT_A = {"sphere": tuple(COLORS), "cube": _OTHER_FOUR, "cylinder": _FOUR}
COGENT_B = {"sphere": tuple(COLORS), "cube": _FOUR, "cylinder": _OTHER_FOUR}
CONDITIONS = {"clevr": EVERY_COLOR, "cogent-a": COGENT_A, "cogent-b": COGENT_B}


@dataclass(frozen=True)
class SceneRules:
    """Distribution of scenes; the defaults are CLEVR's.

    Draw the number of objects uniformly from `objects`, and jitter camera and lamps once. Place the objects one by one:
    draw a size, then up to `tries` positions until one keeps its distances to all earlier objects. Attributes are
    uniform: the shape, then one of its colours. If an object finds no place or shows too few pixels, draw all objects
    again, at most `restarts` times.

    Args:
        objects: smallest and largest number of objects of a scene.
        half_side: bounds the centres, -half_side < x, y < half_side.
        min_distance: between the outlines of two objects, taken as discs of their half size.
        margin: between the centres of two objects, along `right` and along `behind` (see `DIRECTIONS`).
        min_visible_pixels: of every object in a 480x320 image, whatever size is rendered.
        tries, restarts: see above; ten objects need about twenty restarts on average.
        camera_jitter, lamp_jitter: largest shift of every coordinate of the location, uniform; 0 to 3.
        sizes, materials: the classes that occur.
        palettes: the shapes that occur and the colours of each, for instance `COGENT_A`.

    Raises:
        InputError: an invalid rule; in `sample`, rules that hardly any scene meets.
    """

    objects: tuple[int, int] = (3, 10)
    half_side: float = 3.0
    min_distance: float = 0.25
    margin: float = 0.4
    min_visible_pixels: float = 200
    tries: int = 50
    restarts: int = 2000
    camera_jitter: float = JITTER
    lamp_jitter: float = 1.0
    sizes: tuple[str, ...] = CLEVR.field("size").classes
    materials: tuple[str, ...] = CLEVR.field("material").classes
    palettes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(EVERY_COLOR))

    def __post_init__(self) -> None:
        least, most = self.objects
        if not 0 <= least <= most:
            raise InputError(f"objects: expected 0 <= least <= most, got {least} and {most}")
        # jitter over 3 may put a camera or a lamp between the objects or into the floor
        limits = dict.fromkeys(("half_side", "min_distance", "margin", "min_visible_pixels"), (0, math.inf))
        limits |= dict.fromkeys(("tries", "restarts"), (1, math.inf))
        limits |= dict.fromkeys(("camera_jitter", "lamp_jitter"), (0, 3))
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise InputError(f"{name}: expected a number from {low} to {high}, got {value}")
        for name, values, known in (
            ("sizes", self.sizes, HALF_SIZE),
            ("materials", self.materials, CLEVR.field("material").classes),
            ("palettes", tuple(self.palettes), SHAPES),
            *((f"palettes, {shape}", colors, COLORS) for shape, colors in self.palettes.items()),
        ):
            if not values or isinstance(values, str) or not set(values) <= set(known):
                raise InputError(f"{name}: expected one or more of {', '.join(known)}, got {values!r}")

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw a random scene, which depends on the state of the generator alone."""
        least, most = self.objects
        count = int(rng.integers(least, most + 1))
        camera = Camera(_jittered(rng, NOMINAL_CAMERA.location, self.camera_jitter))
        lamps = {name: _jittered(rng, location, self.lamp_jitter) for name, location in NOMINAL_LAMPS.items()}
        hidden = 0
        for _ in range(self.restarts):
            places = self._places(rng, count)
            if places is None:
                continue
            objects = tuple(self._object(rng, *place) for place in places)
            if all_visible(objects, camera, self.min_visible_pixels):
                return Scene(objects, camera, lamps)
            hidden += 1
        raise InputError(
            f"no room for {count} objects in {self.restarts} tries ({hidden} had room for all, but hid one); "
            "use fewer objects (CLEVR has 3 to 10) or looser rules"
        )

    def _places(self, rng: np.random.Generator, count: int) -> list[tuple[float, float, str]] | None:
        """Position (x, y) and size of objects that keep their distances, or None if one finds no place."""
        (right_x, right_y), (behind_x, behind_y) = DIRECTIONS.tolist()
        side, margin, distance, random = self.half_side, self.margin, self.min_distance, rng.random
        chosen: list[tuple[float, float, float, float, float]] = []
        sizes = [_one_of(rng, self.sizes) for _ in range(count)]
        for size in sizes:
            half = HALF_SIZE[size]
            for _ in range(self.tries):
                x, y = side * (2 * random() - 1), side * (2 * random() - 1)
                right, behind = right_x * x + right_y * y, behind_x * x + behind_y * y
                for other_x, other_y, other_right, other_behind, other_half in chosen:
                    if (
                        -margin < right - other_right < margin
                        or -margin < behind - other_behind < margin
                        or math.hypot(x - other_x, y - other_y) - half - other_half < distance
                    ):
                        break
                else:
                    chosen.append((x, y, right, behind, half))
                    break
            else:
                return None
        return [(x, y, size) for (x, y, *_), size in zip(chosen, sizes, strict=True)]

    def _object(self, rng: np.random.Generator, x: float, y: float, size: str) -> SceneObject:
        shape = _one_of(rng, tuple(self.palettes))
        return SceneObject(
            coords=(x, y, HALF_SIZE[size]),
            rotation=float(rng.uniform(0, 360)),  # CLEVR draws degrees and uses the number as radians
            material=_one_of(rng, self.materials),
            color=_one_of(rng, self.palettes[shape]),
            shape=shape,
            size=size,
        )


def sample_scenes(rngs: Sequence[np.random.Generator], rules: SceneRules | None = None) -> list[Scene]:
    """Draw a random scene from each generator, independently of the others."""
    return [(rules or SceneRules()).sample(rng) for rng in rngs]


def _one_of(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _jittered(rng: np.random.Generator, location: Sequence[float], jitter: float) -> tuple[float, float, float]:
    return tuple((np.array(location) + rng.uniform(-jitter, jitter, size=3)).tolist())


# CLEVR's rule against hidden objects: every object shows enough pixels. Rendering every candidate would cost more than
# the rest of the sampling. A lower bound settles nearly all objects: an object contains the sphere of its half size and
# is inside an upright cylinder, so it shows at least its sphere's disc less the cylinders of the others. Pixels are
# counted only for the few objects that the bound leaves open.
WIDTH, HEIGHT = 480, 320  # of CLEVR's images, to which the counts refer
RADIUS = {"sphere": 1.0, "cube": 1.35, "cylinder": 1.0}  # of the upright cylinder around each shape of half size 1
POINTS = 32  # on each disc
CERTAIN = 1.25  # factor over the wanted pixels that settles an object: the points estimate the visible share
NEAR = 0.1  # closest visible depth
CORNERS = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(-1, 3)

_number = np.arange(POINTS) + 0.5
_turn = _number * math.pi * (3 - math.sqrt(5))
DISC = np.sqrt(_number / POINTS)[:, None] * np.stack([np.cos(_turn), np.sin(_turn)], axis=1)  # evenly over the disc


def all_visible(objects: Sequence[SceneObject], camera: Camera, min_pixels: float) -> bool:
    """Whether every object is the nearest one at `min_pixels` or more pixel centres of a 480x320 image.

    The ground hides nothing, as in CLEVR's generator.
    """
    if not objects or min_pixels <= 0:
        return True
    doubtful = np.flatnonzero(visible_bound(objects, camera) < CERTAIN * min_pixels)
    return all(count_visible(objects, number, camera) >= min_pixels for number in doubtful)


def visible_bound(objects: Sequence[SceneObject], camera: Camera) -> np.ndarray:
    """Approximate lower bound of the pixels `[n]` that each object shows in a 480x320 image."""
    centre = np.array([obj.coords for obj in objects])
    half = np.array([HALF_SIZE[obj.size] for obj in objects])
    points = centre[:, None] + half[:, None, None] * (DISC @ camera.axes()[:2])
    px, py, depth = np.moveaxis(camera.project(points, WIDTH, HEIGHT), -1, 0)
    inside = (depth > NEAR) & (px > 0) & (px < WIDTH) & (py > 0) & (py < HEIGHT)
    before = cylinders_before(objects, camera, points - camera.location)
    before[np.arange(len(objects)), np.arange(len(objects))] = False
    share = (inside & ~before.any(axis=0)).mean(axis=1)
    return share * math.pi * (half * FOCAL * WIDTH / np.maximum(depth.mean(axis=1), NEAR)) ** 2


def cylinders_before(objects: Sequence[SceneObject], camera: Camera, rays: np.ndarray) -> np.ndarray:
    """Whether the upright cylinder around each object hides the ends of `rays` `[..., 3]`: `[objects, ...]`.

    With the camera at 0 and the end at 1, the ray enters the cylinder's circle before 1 and is below the cylinder's top
    where it leaves the circle, or at 1.
    """
    x, y, z = np.moveaxis(rays, -1, 0)[:, None]
    table = [(*np.subtract(camera.location, o.coords), HALF_SIZE[o.size], RADIUS[o.shape]) for o in objects]
    off_x, off_y, off_z, half, radius = np.array(table).T.reshape(5, len(objects), *[1] * (rays.ndim - 1))
    radius = half * radius
    a = x * x + y * y
    b = off_x * x + off_y * y
    root = b * b - a * (off_x**2 + off_y**2 - radius**2)
    reach = np.sqrt(np.maximum(root, 0))
    leave = np.minimum((reach - b) / a, 1)
    return (root > 0) & (-b - reach < a) & (leave > 0) & (off_z + leave * z < half)


def count_visible(objects: Sequence[SceneObject], number: int, camera: Camera) -> int:
    """Number of pixel centres of a 480x320 image at which the object of this number is the nearest."""
    rays = camera.rays(WIDTH, HEIGHT, box=_box(objects[number], camera)).reshape(-1, 3).T
    depth = _depth(objects[number], camera, rays)
    rays, depth = rays[:, np.isfinite(depth)], depth[np.isfinite(depth)]
    seen = np.ones(len(depth), dtype=bool)
    for other, before in enumerate(cylinders_before(objects, camera, (rays * depth).T)):
        if other != number and before.any():
            seen[before] &= _depth(objects[other], camera, rays[:, before]) > depth[before]
    return int(seen.sum())


def _box(obj: SceneObject, camera: Camera) -> tuple[int, int, int, int]:
    """Pixels (left, top, right, bottom) around an object, inside the image."""
    corners = HALF_SIZE[obj.size] * np.array([RADIUS[obj.shape], RADIUS[obj.shape], 1]) * CORNERS
    seen = camera.project(obj.coords + corners, WIDTH, HEIGHT)
    if seen[:, 2].min() <= NEAR:  # the corners have no finite projection
        return 0, 0, WIDTH, HEIGHT
    edges = [np.floor(seen[:, :2].min(0)), np.ceil(seen[:, :2].max(0))]
    return tuple(np.clip(edges, 0, (WIDTH, HEIGHT)).astype(int).reshape(-1).tolist())


def _depth(obj: SceneObject, camera: Camera, rays: np.ndarray) -> np.ndarray:
    """Depth `[n]` at which rays `[3, n]` from the camera first meet an object, `inf` where they do not."""
    c, s = math.cos(obj.rotation), math.sin(obj.rotation)
    to_unit = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) / HALF_SIZE[obj.size]
    origin = to_unit @ np.subtract(camera.location, obj.coords)
    direction = torch.from_numpy(to_unit @ rays)
    hit = HITS[SHAPES.index(obj.shape)](torch.from_numpy(origin)[:, None].expand_as(direction), direction).numpy()
    return np.where(hit > 0, hit, np.inf)
