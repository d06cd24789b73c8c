"""Pictures of scenes: visibility, lights, materials and the final image, in NumPy and fast enough for training sets.

The stages can be read one by one: `find_visible` casts rays at the objects; `gather_fragments` makes one shaded point
of every object in every pixel; `ground_points` and `lights_at` give the light that arrives; `shade_objects` and
`shade_ground` turn it into radiance; `render` blends by coverage and encodes as sRGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from setpred.data.camera import ASPECT
from setpred.data.ground import ALBEDO, FAR, ground_hit, ground_normal
from setpred.data.lighting import Light, dot, lights_at, unshadowed
from setpred.data.scenes import Scene
from setpred.data.shapes import NORMAL
from setpred.data.visibility import GROUND, HALF_SIZE, Visibility, find_visible, turn
from setpred.data.visibility import instance_map as _instance_map

# CLEVR's colours: 0..255 over 255 are linear values
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
PI = np.float32(np.pi)
AMBIENT_GROUND = 0.012  # radiance that reaches the ground from backdrop and objects, seen after reflection
TABLE_SIZE = 4096


def _srgb_table() -> np.ndarray:
    """8-bit sRGB of the squares of evenly spaced numbers in [0, 1]: fine steps where the curve is steep."""
    linear = ((np.arange(TABLE_SIZE) + 0.5) / TABLE_SIZE) ** 2
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


SRGB = _srgb_table()


@dataclass(frozen=True)
class Fragments:
    """The objects' visible parts, one entry for every object in every pixel where it shows.

    pixel: flat pixel index `[n]`; owner: object index `[n]`; coverage: share of the pixel `[n]`.
    points, normals: world `[3, n]`, means over the visible part; view: unit vectors towards the camera `[3, n]`.
    """

    pixel: np.ndarray
    owner: np.ndarray
    coverage: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    view: np.ndarray


def instance_map(scene: Scene, width: int, height: int, *, aspect: float = ASPECT) -> np.ndarray:
    """Index into `scene.objects` of what is seen at each pixel centre, -1 for the ground: int8 `[height, width]`."""
    return _instance_map(scene.objects, scene.camera, width, height, aspect=aspect)


def render(scene: Scene, *, width: int, height: int, samples: int = 2, aspect: float = ASPECT) -> np.ndarray:
    """The picture of a scene: uint8 `[height, width, 3]`, sRGB.

    Edges are anti-aliased with `samples` x `samples` rays in each pixel; `aspect` is the view's width over its height,
    stretched to the image (see `Camera`).
    """
    visible = find_visible(scene.objects, scene.camera, width, height, samples=samples, aspect=aspect)
    free = (visible.ids == GROUND).mean(axis=0, dtype=np.float32).reshape(-1)
    pixels = np.flatnonzero(free)
    ground = ground_points(scene, visible, pixels)
    fragments = gather_fragments(scene, visible)
    metal = np.array([obj.material == "metal" for obj in scene.objects], dtype=bool)[fragments.owner]
    mirrored, reflection, lost = reflected_points(fragments, metal)

    points = np.concatenate([ground, fragments.points, mirrored], axis=1)
    count, shown = ground.shape[1], fragments.points.shape[1]
    owner = np.full(points.shape[1], GROUND)
    owner[count : count + shown] = fragments.owner
    lights = [
        light._replace(irradiance=light.irradiance * unshadowed(points, owner, light, scene.objects))
        for light in lights_at(points, scene)
    ]
    lit = shade_ground(ground, [_part(light, slice(0, count)) for light in lights])
    floor = shade_ground(mirrored, [_part(light, slice(count + shown, None)) for light in lights])
    floor = np.where(lost, 0, floor)
    color = shade_objects(
        scene, fragments, metal, reflection, floor, [_part(li, slice(count, count + shown)) for li in lights]
    )

    image = np.zeros((3, height * width), dtype=np.float32)
    image[:, pixels] = lit * free[pixels]
    for channel in range(3):
        image[channel] += np.bincount(fragments.pixel, fragments.coverage * color[channel], minlength=height * width)
    index = np.sqrt(np.clip(image, 0, 1)) * (TABLE_SIZE - 1) + np.float32(0.5)
    return SRGB[index.astype(np.int16)].T.reshape(height, width, 3).copy()


def _part(light: Light, which: slice) -> Light:
    """A light at some of its points."""
    direction = light.direction if light.direction.shape[1] == 1 else light.direction[:, which]
    return light._replace(direction=direction, irradiance=light.irradiance[which])


def ground_points(scene: Scene, visible: Visibility, pixels: np.ndarray) -> np.ndarray:
    """Where the centres of the given flat pixel indices meet the ground: `[3, pixels]`."""
    right, up, backward = scene.camera.axes().astype(np.float32)[:, :, None]
    width = visible.ids.shape[2]
    x, y = visible.x.mean(axis=0)[pixels % width], visible.y.mean(axis=0)[pixels // width]
    direction = right * x + up * y - backward
    origin = np.array(scene.camera.location, dtype=np.float32)[:, None]
    return origin + np.minimum(ground_hit(origin, direction), 60) * direction


def gather_fragments(scene: Scene, visible: Visibility) -> Fragments:
    """Averages each object's samples inside each pixel into one fragment."""
    total, _, width = visible.ids.shape
    flat_ids = visible.ids.reshape(total, -1)
    found = [np.empty(0, dtype=np.intp)]
    for index, (left, top, right, bottom) in enumerate(visible.boxes):
        rows, columns = np.nonzero((visible.ids[:, top:bottom, left:right] == index).any(axis=0))
        found.append((rows + top) * width + columns + left)
    owner = np.repeat(np.arange(-1, len(found) - 1), [len(part) for part in found])
    pixel = np.concatenate(found)
    mine = flat_ids[:, pixel] == owner
    number = mine.sum(axis=0)
    weight = mine.astype(np.float32) / number
    t = np.where(mine, visible.depth.reshape(total, -1)[:, pixel], 0)
    axes = scene.camera.axes().astype(np.float32)
    x, y = visible.x[:, pixel % width], visible.y[:, pixel // width]
    right, up, backward = axes[:, :, None, None]
    location = np.array(scene.camera.location, dtype=np.float32)
    samples = location[:, None, None] + t * (right * x + up * y - backward)
    points = (samples * weight).sum(axis=1)
    normals = np.zeros_like(points)
    matrices = np.array([turn(obj.rotation) for obj in scene.objects], dtype=np.float32).reshape(-1, 3, 3)
    for shape, normal in NORMAL.items():
        which = np.flatnonzero(np.array([obj.shape == shape for obj in scene.objects], dtype=bool)[owner])
        if not which.size:
            continue
        of = owner[which]
        centre = np.array([obj.coords for obj in scene.objects], dtype=np.float32).T
        half = np.array([HALF_SIZE[obj.size] for obj in scene.objects], dtype=np.float32)
        q = (samples[:, :, which] - centre[:, None, of]) / half[of]
        c, s = matrices[of, 0, 0], matrices[of, 1, 0]
        n = normal(np.stack([c * q[0] + s * q[1], c * q[1] - s * q[0], q[2]]))
        n = n / np.sqrt(dot(n, n) + np.float32(1e-12))
        n = (n * weight[:, which]).sum(axis=1)
        normals[:, which] = np.stack([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])
    normals /= np.sqrt(dot(normals, normals) + np.float32(1e-12))
    view = location[:, None] - points
    view /= np.sqrt(dot(view, view))
    return Fragments(pixel, owner, number.astype(np.float32) / total, points, normals, view)


def reflected_points(fragments: Fragments, metal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the mirror rays of the metal fragments end: ground points `[3, m]`, directions `[3, m]`, lost `[m]`."""
    view, normals = fragments.view[:, metal], fragments.normals[:, metal]
    direction = 2 * dot(view, normals) * normals - view
    origin = fragments.points[:, metal]
    t = ground_hit(origin, direction)
    lost = t >= FAR
    return origin + np.where(lost, 0, t) * direction, direction, lost


def shade_ground(points: np.ndarray, lights: list[Light]) -> np.ndarray:
    """Radiance `[3, n]` of the white, matt ground."""
    normals = ground_normal(points)
    total = np.full((3, points.shape[1]), AMBIENT_GROUND, dtype=np.float32)
    for light in lights:
        cosine = np.maximum(dot(light.direction, normals), 0)
        total += (np.float32(ALBEDO) / PI) * light.color[:, None] * (light.irradiance * cosine)
    return total


def shade_objects(
    scene: Scene,
    fragments: Fragments,
    metal: np.ndarray,
    reflection: np.ndarray,
    floor: np.ndarray,
    lights: list[Light],
) -> np.ndarray:
    """Radiance `[3, n]` that the fragments send to the camera."""
    base = np.array([COLORS[obj.color] for obj in scene.objects], dtype=np.float32).reshape(-1, 3).T / 255
    base = base[:, fragments.owner]
    normals, view = fragments.normals, fragments.view
    diffuse = np.zeros_like(base)
    gloss = np.zeros_like(base)
    for light in lights:
        cosine = np.maximum(dot(light.direction, normals), 0)
        diffuse += light.color[:, None] * (light.irradiance * cosine)
        half = light.direction + view
        half = half / np.sqrt(dot(half, half))
        tilt = np.maximum(dot(half, normals), 0)
        alpha = np.where(metal, np.float32(0.2), np.float32(0.35))
        lobe = alpha**2 / (PI * (tilt**2 * (alpha**2 - 1) + 1) ** 2)
        sharp = np.float32(0.06) ** 2 / (PI * (tilt**2 * (np.float32(0.06) ** 2 - 1) + 1) ** 2)
        lobe = np.where(metal, 0.4 * lobe + 0.6 * sharp, 0.02 * lobe)
        gloss += light.color[:, None] * (light.irradiance * lobe * (cosine > 0)) / 4
    below = (1 - normals[2]) / 2
    bounce = np.float32(0.2) * below * np.clip(fragments.points[2] / 0.35, 0.2, 1) + np.float32(0.03)
    result = base / PI * (diffuse + bounce * PI * 0.6) + gloss
    result[:, metal] = base[:, metal] * (floor + gloss[:, metal])
    return result
