"""Random scenes by CLEVR's rules: what lies where, seen from which camera, lit by which lamps.

Source: the official generator and its base scene (see the repository facebookresearch/clevr-dataset-gen).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from setpred.errors import InputError
from setpred.rendering.camera import JITTER, NOMINAL_CAMERA, Camera
from setpred.rendering.occlusion import all_visible
from setpred.rendering.scenes import COLORS, HALF_SIZE, NOMINAL_LAMPS, SHAPES, Scene, SceneObject
from setpred.schema import CLEVR

# The image plane's directions on the ground for the camera without jitter: `right`, then `behind`. CLEVR writes the
# same two into every scene.
DIRECTIONS = np.array([[0.6563112735748291, 0.7544902563095093], [-0.754490315914154, 0.6563112735748291]])

# Which colours each shape may have. Conditions A and B test whether a model takes shape and colour apart
# (Johnson et al., CVPR 2017, section 4.7).
_FOUR, _OTHER_FOUR = ("red", "green", "purple", "cyan"), ("gray", "blue", "brown", "yellow")
EVERY_COLOR = {shape: tuple(COLORS) for shape in SHAPES}
COGENT_A = {"sphere": tuple(COLORS), "cube": _OTHER_FOUR, "cylinder": _FOUR}
COGENT_B = {"sphere": tuple(COLORS), "cube": _FOUR, "cylinder": _OTHER_FOUR}
CONDITIONS = {"clevr": EVERY_COLOR, "cogent-a": COGENT_A, "cogent-b": COGENT_B}


@dataclass(frozen=True)
class SceneRules:
    """What scenes there are; the defaults are CLEVR's.

    The count is uniform in `objects` and kept; camera and lamps are jittered once. Then the objects are placed one by
    one: a size, and positions until one lies apart from all objects before, at most `tries`. Attributes are uniform:
    the shape, then one of its colours. When an object finds no place, or one shows too little, all objects are drawn
    again, at most `restarts` times.

    Args:
        objects: least and most objects of a scene, both included.
        half_side: centres lie in -half_side < x, y < half_side.
        min_distance: between the outlines of two objects, taken as discs of their half size.
        margin: between the centres of two objects, along `right` and along `behind` (see `DIRECTIONS`).
        min_visible_pixels: of every object in a 480x320 image; in another size the same share of the pixels. Scenes
            therefore do not depend on the size of the image.
        tries, restarts: see above; ten objects need about twenty restarts on average.
        camera_jitter, lamp_jitter: every coordinate of the location moves by up to this, uniformly; 0 to 3.
        sizes, materials: those that occur.
        palettes: the shapes that occur and the colours of each, as `COGENT_A` for instance.

    Raises:
        InputError: a rule that makes no sense; when sampling, rules that hardly any scene meets.
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
        # a camera or a lamp that moves further may end between the objects or in the floor
        for name, low, high in (
            ("half_side", 0, math.inf),
            ("min_distance", 0, math.inf),
            ("margin", 0, math.inf),
            ("min_visible_pixels", 0, math.inf),
            ("tries", 1, math.inf),
            ("restarts", 1, math.inf),
            ("camera_jitter", 0, 3),
            ("lamp_jitter", 0, 3),
        ):
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
        """A random scene; it depends on the state of the generator alone."""
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
            "ask for fewer objects (CLEVR has 3 to 10) or looser rules"
        )

    def _places(self, rng: np.random.Generator, count: int) -> list[tuple[float, float, str]] | None:
        """Position (x, y) and size of objects that keep their distances, or None when one finds no place."""
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


def sample_scene(
    rng: np.random.Generator, *, objects: tuple[int, int] = (3, 10), min_visible_pixels: float = 200
) -> Scene:
    """A random scene as CLEVR's generator draws it; `SceneRules` has more to choose."""
    return SceneRules(objects=objects, min_visible_pixels=min_visible_pixels).sample(rng)


def sample_scenes(rngs: Sequence[np.random.Generator], rules: SceneRules | None = None) -> list[Scene]:
    """A random scene from each generator; none depends on the others."""
    rules = SceneRules() if rules is None else rules
    return [rules.sample(rng) for rng in rngs]


def _one_of(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _jittered(
    rng: np.random.Generator, location: tuple[float, float, float], jitter: float
) -> tuple[float, float, float]:
    return tuple((np.array(location) + rng.uniform(-jitter, jitter, size=3)).tolist())
