"""Files of built-in scenes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from setpred import rendering
from setpred.data.cache import Header, Record
from setpred.data.workers import ordered_map
from setpred.data.writer import write_set_file
from setpred.errors import InputError
from setpred.rendering.renderer import render
from setpred.rendering.sampling import CONDITIONS, SceneRules, sample_scenes
from setpred.rendering.scenes import Scene
from setpred.schema import CLEVR

MOST_IMAGES, LARGEST = 10**8, 4096  # a slip of the finger should not fill a disk
BLOCK = 32  # scenes rendered together: enough to keep torch busy, few enough for a processor's caches


def built_in_scenes(
    numbers: Sequence[int], *, seed: int, objects: tuple[int, int], condition: str = "clevr"
) -> list[Scene]:
    """Scenes of these numbers: each depends on `seed` and its number only, whoever makes it and when."""
    rules = SceneRules(objects=objects, palettes=CONDITIONS[condition])
    return sample_scenes([np.random.default_rng([seed, number]) for number in numbers], rules)


def render_records(
    numbers: Sequence[int], *, seed: int, image_size: int, objects: tuple[int, int], condition: str = "clevr"
) -> list[Record]:
    """Rows of these numbers of a rendering."""
    scenes = built_in_scenes(numbers, seed=seed, objects=objects, condition=condition)
    images = render(scenes, width=image_size, height=image_size).numpy()
    return [
        Record(
            image=image,
            elements=CLEVR.encode([obj.as_dict() for obj in scene.objects]),
            camera=np.array(scene.camera.location, dtype=np.float64),
            index=number,
        )
        for number, scene, image in zip(numbers, scenes, images, strict=True)
    ]


def rendered_source(*, objects: tuple[int, int], seed: int, condition: str = "clevr") -> dict[str, Any]:
    """Which scenes these are, in plain types; CLEVR's own condition goes without saying."""
    if not 0 <= objects[0] <= objects[1] <= CLEVR.max_objects:
        raise InputError(f"objects: expected 0 <= least <= most <= {CLEVR.max_objects}, got {objects[0]} {objects[1]}")
    if seed < 0:
        raise InputError(f"expected a seed of at least 0, got {seed}")
    if condition not in CONDITIONS:
        raise InputError(f"expected a condition out of {', '.join(CONDITIONS)}, got {condition!r}")
    source = {"kind": "rendered", "objects": list(objects), "seed": seed}
    return source if condition == "clevr" else source | {"condition": condition}


def rendered_header(
    *, images: int, image_size: int, objects: tuple[int, int], seed: int, condition: str = "clevr"
) -> Header:
    """What `render_file` with these arguments writes."""
    if images < 1 or image_size < 8:
        raise InputError(f"expected at least 1 image of at least 8x8 pixels, got {images} of {image_size}x{image_size}")
    if images > MOST_IMAGES or image_size > LARGEST:
        raise InputError(
            f"expected at most {MOST_IMAGES} images of at most {LARGEST}x{LARGEST} pixels, got {images} of "
            f"{image_size}x{image_size}"
        )
    return Header(images, image_size, CLEVR, rendered_source(objects=objects, seed=seed, condition=condition))


def render_file(
    path: str | os.PathLike[str],
    *,
    images: int,
    image_size: int,
    objects: tuple[int, int] = (3, 10),
    seed: int = 0,
    condition: str = "clevr",
    workers: int = 0,
    force: bool = False,
) -> str:
    """Renders random scenes into a file of `setpred.data.cache`'s format; the content does not depend on `workers`.

    Args:
        objects: least and most objects of a scene.
        condition: which colours each shape may have, out of `setpred.rendering.sampling.CONDITIONS`.
        workers: processes to render in; 0 renders in this one.

    Returns:
        The SHA-256 of the content.
    """
    which = {"objects": objects, "seed": seed, "condition": condition}
    header = rendered_header(images=images, image_size=image_size, **which)
    some = partial(render_records, image_size=image_size, **which)

    def records(start: int) -> Iterator[Record]:
        blocks = (range(first, min(first + BLOCK, images)) for first in range(start, images, BLOCK))
        with closing(ordered_map(some, blocks, workers=workers)) as done:
            for block in done:
                yield from block

    return write_set_file(
        path,
        header,
        records,
        producer=renderer_fingerprint(),
        description=f"rendering {image_size}x{image_size}",
        force=force,
    )


def renderer_fingerprint() -> str:
    """Changes with the code of the renderer, so that a file is not continued by another one."""
    sources = sorted(Path(rendering.__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
