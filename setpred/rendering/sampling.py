"""Random scenes by CLEVR's rules: what lies where, seen from which camera, lit by which lamps.

Source: the official generator and its base scene (see the repository facebookresearch/clevr-dataset-gen).
"""

from __future__ import annotations

import numpy as np

from setpred.errors import InputError
from setpred.rendering.bodies import Bodies
from setpred.rendering.camera import JITTER, NOMINAL_CAMERA, Camera
from setpred.rendering.scenes import HALF_SIZE, NOMINAL_LAMPS, Scene, SceneObject
from setpred.rendering.visibility import find_visible
from setpred.schema import CLEVR

HALF_SIDE = 3.0  # objects lie in -3 < x, y < 3
MIN_DISTANCE = 0.25  # between the outlines of two objects, taken as discs
MARGIN = 0.4  # between the centres of two objects, along `right` and along `behind`
TRIES = 50  # positions tried for one object before the whole scene starts again
RESTARTS = 2000  # whole scenes tried; ten objects need about twenty on average
MIN_VISIBLE_PIXELS = 200  # of every object, in an image of 480x320
COUNTED = (120, 80)  # the image size at which visible pixels are counted: a sixteenth of the pixels
LAMP_JITTER = 1.0

# The image plane's directions on the ground for the camera without jitter: `right`, then `behind`. CLEVR writes the
# same two into every scene.
DIRECTIONS = np.array([[0.65631127, 0.75449026], [-0.75449032, 0.65631127]])


def sample_scene(
    rng: np.random.Generator, *, objects: tuple[int, int] = (3, 10), min_visible_pixels: int = MIN_VISIBLE_PIXELS
) -> Scene:
    """A random scene as CLEVR's generator draws it.

    The count is uniform in `objects` (both ends included) and kept; camera and lamps are jittered. Objects are placed
    one by one, each with uniform attributes and at most 50 tries for its position: outlines at least 0.25 apart,
    centres at least 0.4 apart both along `right` and along `behind`. When an object finds no place, or when one shows
    fewer than `min_visible_pixels` of 480x320 (counted on a coarser grid), all objects are drawn again.

    Raises:
        InputError: the range of counts is not one, or so many objects do not fit.
    """
    low, high = objects
    if not 0 <= low <= high:
        raise InputError(f"objects: expected 0 <= least <= most, got {low} and {high}")
    count = int(rng.integers(low, high + 1))
    camera = Camera(_jittered(rng, NOMINAL_CAMERA.location, JITTER))
    lamps = {name: _jittered(rng, location, LAMP_JITTER) for name, location in NOMINAL_LAMPS.items()}
    for _ in range(RESTARTS):
        placed = _place(rng, count)
        if placed is not None and _all_visible(placed, camera, min_visible_pixels):
            return Scene(placed, camera, lamps)
    raise InputError(f"no room for {count} objects in {RESTARTS} tries; ask for fewer objects (CLEVR has 3 to 10)")


def _jittered(
    rng: np.random.Generator, location: tuple[float, float, float], jitter: float
) -> tuple[float, float, float]:
    return tuple((np.array(location) + rng.uniform(-jitter, jitter, size=3)).tolist())


def _place(rng: np.random.Generator, count: int) -> tuple[SceneObject, ...] | None:
    """Objects that keep the distances, or None when one of them finds no place."""
    names = {name: CLEVR.field(name).classes for name in ("material", "color", "shape", "size")}
    drawn = {name: rng.integers(len(classes), size=count) for name, classes in names.items()}
    half_sizes = np.array([HALF_SIZE[size] for size in names["size"]])[drawn["size"]]
    rotations = rng.uniform(0, 360, size=count)  # CLEVR draws degrees and uses the number as radians
    tries = rng.uniform(-HALF_SIDE, HALF_SIDE, size=(count, TRIES, 2))
    along = tries @ DIRECTIONS.T
    chosen: list[int] = []
    for k in range(count):
        free = np.ones(TRIES, dtype=bool)
        if chosen:
            before = np.arange(k)
            apart = tries[k, :, None] - tries[before, chosen]
            gap = np.sqrt((apart**2).sum(-1)) - half_sizes[k] - half_sizes[:k]
            margin = np.abs(along[k, :, None] - along[before, chosen]).min(-1)
            free = ((gap >= MIN_DISTANCE) & (margin >= MARGIN)).all(axis=1)
        if not free.any():
            return None
        chosen.append(int(free.argmax()))
    return tuple(
        SceneObject(
            coords=(*tries[k, chosen[k]].tolist(), float(half_sizes[k])),
            rotation=float(rotations[k]),
            **{name: names[name][drawn[name][k]] for name in names},
        )
        for k in range(count)
    )


def _all_visible(objects: tuple[SceneObject, ...], camera: Camera, min_visible_pixels: int) -> bool:
    if not objects or min_visible_pixels <= 0:
        return True
    width, height = COUNTED
    seen = find_visible(Bodies.of(objects), camera, width, height, samples=1).ids
    counts = np.bincount(seen[seen >= 0], minlength=len(objects))
    return bool(counts.min() >= min_visible_pixels * width * height / (480 * 320))
