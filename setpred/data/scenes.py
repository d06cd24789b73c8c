"""Built-in scenes, rendered into an HDF5 file or a folder of the CLEVR layout."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from setpred import rendering
from setpred.data.hdf5 import MOST_IMAGES, Header, Record, plain_json
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import save_mask
from setpred.data.shards import FINISHED, finished_shards
from setpred.errors import InputError
from setpred.files import LARGEST_IMAGE, locked, make_folder, publish, writing
from setpred.rendering.records import camera_record, image_name, scene_record
from setpred.rendering.renderer import annotate, render
from setpred.rendering.sampling import CONDITIONS, SceneRules, sample_scenes
from setpred.rendering.scenes import Scene
from setpred.schema import CLEVR

CAMERAS = "cameras.jsonl"  # beyond CLEVR: places of camera and lamps
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # in radians
BATCH_PIXELS = 300_000  # rendered together: enough to keep torch busy, few enough for a processor's caches


def built_in_scenes(
    numbers: Sequence[int], *, seed: int, objects: tuple[int, int], condition: str = "clevr", views: int | None = None
) -> list[Scene]:
    """The scenes of these numbers; each is a function of `seed` and its number.

    With `views` V, number V s + k is scene s from its camera k, CLEVR's turned by k golden angles: any number of
    cameras goes round the scene nearly evenly, and fewer of them are the first ones.
    """
    rules = SceneRules(objects=tuple(objects), palettes=CONDITIONS[condition])
    drawn = list(dict.fromkeys(number // (views or 1) for number in numbers))
    scenes = dict(zip(drawn, sample_scenes([np.random.default_rng([seed, s]) for s in drawn], rules), strict=True))
    if views is None:
        return [scenes[number] for number in numbers]
    pairs = ((scenes[number // views], GOLDEN_ANGLE * (number % views)) for number in numbers)
    return [replace(scene, camera=scene.camera.turned(angle)) for scene, angle in pairs]


def _drawn(scenes: Sequence[Scene], width: int, height: int, *, masks: bool = False) -> Iterator[np.ndarray]:
    """The picture uint8 `[height, width, 3]` of each scene, or its instances `[height, width]`: 0 is the ground."""
    size = max(1, BATCH_PIXELS // (width * height))
    for first in range(0, len(scenes), size):
        some, sides = scenes[first : first + size], {"width": width, "height": height}
        found = annotate(some, **sides).instances + 1 if masks else render(some, **sides)
        yield from found.numpy().astype(np.uint8)


def render_records(numbers: Sequence[int], *, image_size: int, masks: bool = False, **which: Any) -> list[Record]:
    """The rows of these numbers of a rendering; `which` are the arguments of `built_in_scenes`."""
    scenes = built_in_scenes(numbers, **which)
    sets = (CLEVR.encode([obj.as_dict() for obj in scene.objects]) for scene in scenes)
    cameras = (np.array(scene.camera.location, dtype=np.float64) for scene in scenes)
    pictures, *masks = (_drawn(scenes, image_size, image_size, masks=kind) for kind in (False, True)[: 1 + masks])
    return list(map(Record, pictures, sets, cameras, numbers, *masks))


def _source(
    images: int,
    width: int,
    height: int,
    *,
    objects: tuple[int, int],
    seed: int,
    condition: str = "clevr",
    views: int | None = None,
) -> dict[str, Any]:
    """Check the parameters of the scenes, and return them as plain types, but "clevr" and no views."""
    if not (1 <= images <= MOST_IMAGES and min(width, height) >= 8 and max(width, height) <= LARGEST_IMAGE):
        raise InputError(
            f"expected at least 1 image of at least 8x8 pixels, at most {MOST_IMAGES} images of at most "
            f"{LARGEST_IMAGE}x{LARGEST_IMAGE} pixels, got {images} of {width}x{height}"
        )
    if not 0 <= objects[0] <= objects[1] <= CLEVR.max_objects:
        raise InputError(f"objects: expected 0 <= least <= most <= {CLEVR.max_objects}, got {objects[0]} {objects[1]}")
    if seed < 0:
        raise InputError(f"expected a seed of at least 0, got {seed}")
    if condition not in CONDITIONS:
        raise InputError(f"expected a condition out of {', '.join(CONDITIONS)}, got {condition!r}")
    if views is not None and (views < 1 or images % views):
        raise InputError(f"expected views of at least 1 that divide the number of images, got {views} of {images}")
    source = {"kind": "rendered", "objects": list(objects), "seed": seed}
    source |= {} if views is None else {"views": views}
    return source if condition == "clevr" else source | {"condition": condition}


def rendered_header(*, images: int, image_size: int, masks: bool = False, **which: Any) -> Header:
    """The header of what `render_file` writes with these arguments; `which` are those of `built_in_scenes`.

    Raises:
        InputError: an argument out of range.
    """
    source = _source(images, image_size, image_size, **which)
    return Header(images, image_size, CLEVR, source, instances=masks)


def rendered_name(header: Header) -> str:
    """The name by which a training finds the file of scenes with this header."""
    source = header.source
    scenes = "{}to{}".format(*source["objects"]) + (f"-{source['condition']}" if "condition" in source else "")
    scenes += f"-views{source['views']}" if "views" in source else ""
    masks = "-masks" if header.instances else ""
    return f"rendered-{header.image_size}-{scenes}-seed{source['seed']}-{header.images}{masks}.h5"


_NAME = re.compile(r"rendered-(\d+)-(\d+)to(\d+)(?:-(cogent-[ab]))?(?:-views(\d+))?-seed(\d+)-(\d+)(-masks)?\.h5")


def render_command(path: str | os.PathLike[str]) -> str | None:
    """The command that makes a file of a `rendered_name`; None for other names."""
    if (found := _NAME.fullmatch(Path(path).name)) is None:
        return None
    size, least, most, condition, views, seed, images, masks = found.groups()
    options = {"images": [images], "image-size": [size], "objects": [least, most], "condition": [condition]}
    options |= {"views": [views], "seed": [seed], "out": [os.fspath(path)]}
    words = [word for name, values in options.items() if None not in values for word in (f"--{name}", *values)]
    return shlex.join(["setpred", "data", "render", *words, *["--masks"] * bool(masks)])


def render_file(
    path: str | os.PathLike[str],
    *,
    images: int,
    image_size: int,
    objects: tuple[int, int] = (3, 10),
    seed: int = 0,
    condition: str = "clevr",
    views: int | None = None,
    masks: bool = False,
    workers: int = 0,
    force: bool = False,
) -> str:
    """Render random scenes into a file of `setpred.data.hdf5`'s format.

    Args:
        objects: least and most objects of a scene.
        condition: colours that each shape may have, out of `setpred.rendering.sampling.CONDITIONS`.
        views: images of each scene, one after the other, from cameras around it; a model of sets takes them together.
        masks: keep the visible pixels of each object, as `instances`.
        workers: processes that render; 0 renders in this one. The content does not depend on them.
        force: replace the file if it exists.

    Returns:
        The SHA-256 of the content.

    Raises:
        InputError: a wrong argument, and what `write_set_file` raises.
    """
    which = {"objects": objects, "seed": seed, "condition": condition, "views": views}
    return write_set_file(
        path,
        rendered_header(images=images, image_size=image_size, masks=masks, **which),
        range(images),
        partial(render_records, image_size=image_size, masks=masks, **which),
        producer=renderer_fingerprint(),
        description=f"rendering {image_size}x{image_size}",
        workers=workers,
        force=force,
    )


def renderer_fingerprint() -> str:
    """A hash of the renderer's code, so that pictures of two versions are not mixed."""
    sources = sorted(Path(rendering.__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def render_folder(
    root: str | os.PathLike[str],
    *,
    split: str,
    images: int,
    objects: tuple[int, int] = (3, 10),
    seed: int = 0,
    condition: str = "clevr",
    width: int = 480,
    height: int = 320,
    masks: bool = False,
    workers: int = 0,
    force: bool = False,
) -> None:
    """Render random scenes into one split of a folder in the CLEVR_v1.0 layout, and `cameras.jsonl`.

    The scenes are those of `render_file` with the same `objects`, `seed` and `condition`. An interrupted call,
    repeated, renders the shards that are missing. The file of scenes gets its name last.

    Args:
        split: name of the split; give each split of a folder another seed.
        width, height: size of the pictures in pixels, in which `pixel_coords` count. They show CLEVR's view of 3:2,
            stretched to this size.
        masks: also write masks/SPLIT/*.png, indexed colours: 0 is the ground, k the visible pixels of object k - 1.
        workers: processes that render; 0 renders in this one. The bytes do not depend on them.
        force: replace the split if it exists; it stays until the new one is complete.

    Raises:
        InputError: the split exists, another process is writing it, the disk is full, no permission, a wrong argument.
    """
    which = {"objects": objects, "seed": seed, "condition": condition}
    source = _source(images, width, height, **which)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", split, re.ASCII):
        raise InputError(f"expected a split's name of letters, digits, - and _, got {split!r}")
    settings = {"source": source, "images": images, "width": width, "height": height}
    settings |= {"masks": True} if masks else {}
    root = Path(root)
    scenes, pictures, cameras = root / "scenes" / f"CLEVR_{split}_scenes.json", root / "images" / split, root / CAMERAS
    folder = scenes.with_name(scenes.name + ".partial")
    publishing = folder / "publishing"
    finals = {folder / "pictures": pictures, folder / "masks": root / "masks" / split}  # by where they wait
    waiting = list(finals)[: 1 + masks]
    for path in (scenes, *finals.values()):
        if path.exists() and not force and not publishing.exists():
            raise InputError(f"{path} exists already; choose another folder or split, or replace it with --force")
    job = plain_json(settings | {"producer": f"{renderer_fingerprint()}, pillow {pillow_version}"})
    make = partial(_save_pictures, folders=waiting, split=split, width=width, height=height, which=which)
    load = partial(_load_records, folders=waiting)
    options = {"pixels": width * height, "workers": workers, "description": f"rendering {width}x{height}"}
    with (
        writing(scenes, hint="; the complete shards stay there, run the same command again to resume"),
        finished_shards(folder, range(images), make, load, job=job, **options) as shards,
    ):
        if waiting[0].exists():  # else an interruption came later
            for path in waiting:
                if not path.exists() or len(os.listdir(path)) != images:
                    raise InputError(f"expected {images} pictures in {path}; remove {folder} and run the command again")
            publishing.touch()
            scenes.unlink(missing_ok=True)
            for path in finals.values():  # masks of earlier pictures, too
                shutil.rmtree(path, ignore_errors=True)
        for path in filter(Path.exists, waiting):  # the pictures first: they tell whether the earlier ones are removed
            publish(path, make_folder(finals[path].parent) / split)
        info = {"date": "", "version": "1.0", "split": split, "license": ""} | settings
        with locked(root / f"{CAMERAS}.lock", passing=True, patience=60):  # against other splits
            _publish_lines(folder / FINISHED, cameras, _camera_lines(cameras, split, shards))
        _publish_lines(folder / FINISHED, scenes, _scene_lines(info, shards))


def _save_pictures(
    numbers: Sequence[int],
    path: Path,
    *,
    folders: Sequence[Path],
    split: str,
    width: int,
    height: int,
    which: Mapping[str, Any],
) -> None:
    """Write the pictures of these numbers into the first folder, their masks into the second, if there is one.

    Two lines for each go to `path`: scene and camera.
    """
    lines = []
    scenes = built_in_scenes(numbers, **which)
    for folder, masks in zip(folders, (False, True), strict=False):
        make_folder(folder)
        for number, picture in zip(numbers, _drawn(scenes, width, height, masks=masks), strict=True):
            with open(folder / image_name(split, number), "wb") as file:
                save_mask(file, picture) if masks else Image.fromarray(picture).save(file, "png")
                file.flush()
                os.fsync(file.fileno())
    for number, scene in zip(numbers, scenes, strict=True):
        record = scene_record(scene, index=number, split=split, width=width, height=height)
        lines += [json.dumps(record), json.dumps(camera_record(scene, index=number, split=split))]
    path.write_text("\n".join(lines))


def _load_records(path: Path, folders: Sequence[Path] = ()) -> list[str]:
    """The lines of a shard, after checking that its pictures are in those `folders` that exist."""
    lines = path.read_text().splitlines()
    for folder in filter(Path.exists, folders):
        for line in lines[::2]:
            (folder / json.loads(line)["image_filename"]).stat()
    return lines


def _camera_lines(path: Path, split: str, shards: list[Path]) -> Iterator[str]:
    """The lines of other splits, then those of this one."""
    if path.exists():
        try:
            lines = path.read_text().splitlines()  # the last one may lack its end
            yield from (line + "\n" for line in lines if json.loads(line).get("split") != split)
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is not a file of cameras ({error}); move it away") from error
    yield from (line + "\n" for shard in shards for line in _load_records(shard)[1::2])


def _scene_lines(info: dict[str, Any], shards: list[Path]) -> Iterator[str]:
    """The document of the scenes, piece by piece: 70,000 scenes as Python objects would take gigabytes."""
    yield f'{{"info": {json.dumps(info)}, "scenes": ['
    for number, line in enumerate(line for shard in shards for line in _load_records(shard)[::2]):
        yield (", " if number else "") + line
    yield "]}\n"


def _publish_lines(partial: Path, final: Path, lines: Iterable[str]) -> None:
    with open(partial, "w") as file:
        file.writelines(lines)
    publish(partial, final)
