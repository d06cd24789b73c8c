"""Built-in scenes, rendered into an HDF5 file or a folder of the CLEVR layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from setpred import rendering
from setpred.data.hdf5 import Header, Record, plain_json
from setpred.data.hdf5_writer import write_set_file
from setpred.data.workers import ordered_map
from setpred.errors import InputError
from setpred.files import locked, make_folder, publish, writing
from setpred.progress import progress
from setpred.rendering.records import camera_record, image_name, scene_record
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
    """Renders random scenes into a file of `setpred.data.hdf5`'s format; the content does not depend on `workers`.

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


BLOCK_PIXELS = 300_000  # rendered together; at 480x320 one or two scenes at a time were quickest
SECONDS_BETWEEN_COMMITS = 1.0


class _Paths(NamedTuple):
    """Where a split lies; `journal` and `partial` are there only while it is made."""

    scenes: Path
    journal: Path
    images: Path
    partial: Path
    cameras: Path

    @classmethod
    def of(cls, root: Path, split: str) -> _Paths:
        scenes, images = root / "scenes" / f"CLEVR_{split}_scenes.json", root / "images" / split
        journal, partial = (path.with_name(path.name + ".partial") for path in (scenes, images))
        return cls(scenes, journal, images, partial, root / "cameras.jsonl")


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
    workers: int = 0,
    force: bool = False,
) -> None:
    """Renders random scenes into one split of a folder; its bytes do not depend on `workers`.

    The scenes are those of `render_file` with the same `objects`, `seed` and `condition`. A started split of the same
    arguments and code is continued; another one is started again, with one sentence.

    Args:
        split: name of the split; splits of one folder should have different seeds.
        width, height: of the pictures, which show CLEVR's view of 3:2, stretched if need be. `pixel_coords` count in
            them.
        workers: processes to render in; 0 renders in this one.
        force: replace the split if it is there; it stays until the new one is complete.

    Raises:
        InputError: the split exists, another process is writing it, the disk is full, no permission, a wrong argument.
    """
    if images < 1 or min(width, height) < 8:
        raise InputError(f"expected at least 1 image of at least 8x8 pixels, got {images} of {width}x{height}")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", split, re.ASCII):
        raise InputError(f"expected a split's name of letters, digits, - and _, got {split!r}")
    which = {"objects": objects, "seed": seed, "condition": condition}
    settings = {"source": rendered_source(**which), "images": images, "width": width, "height": height}
    producer = f"{renderer_fingerprint()}, pillow {pillow_version}"
    paths = _Paths.of(Path(root), split)
    make_folder(paths.scenes.parent)
    hint = "; what was done stays there under names that end in .partial, and the same command goes on from there"
    with writing(paths.scenes, hint=hint), locked(paths.journal), open(paths.journal, "r+b") as journal:
        header = plain_json(settings | {"producer": producer})
        done = _open(journal, paths, header, split=split, images=images, force=force)
        some = partial(_render_block, folder=paths.partial, split=split, width=width, height=height, which=which)
        size = min(BLOCK, max(1, BLOCK_PIXELS // (width * height)))
        blocks = (range(first, min(first + size, images)) for first in range(done, images, size))
        with closing(ordered_map(some, blocks, workers=workers)) as rendered:
            lines = (line for block in rendered for line in block)
            shown = progress(lines, total=images, initial=done, description=f"rendering {width}x{height}")
            _write_journal(journal, shown)
        info = {"date": "", "version": "1.0", "split": split, "license": ""} | settings
        _publish(paths, split, info)


def _render_block(
    numbers: Sequence[int],
    *,
    folder: Path,
    split: str,
    width: int,
    height: int,
    which: Mapping[str, Any],
) -> list[str]:
    """Renders the pictures of these numbers into `folder`; returns their lines of the journal."""
    scenes = built_in_scenes(numbers, **which)
    pictures = render(scenes, width=width, height=height).numpy()
    lines = []
    for number, scene, picture in zip(numbers, scenes, pictures, strict=True):
        path = folder / image_name(split, number)
        with writing(path), open(path, "wb") as file:
            Image.fromarray(picture).save(file, "png")
            file.flush()
            os.fsync(file.fileno())
        record = scene_record(scene, index=number, split=split, width=width, height=height)
        lines.append(json.dumps([record, camera_record(scene, index=number, split=split)]))
    return lines


def _open(journal: BinaryIO, paths: _Paths, header: str, *, split: str, images: int, force: bool) -> int:
    """How many pictures are done already; what comes next in the journal is the line of the next one."""
    first = journal.readline()
    done = _whole_lines(journal) if first == header.encode() + b"\n" else None
    if done is not None:
        folder = paths.partial if paths.partial.exists() else paths.images
        there = set(os.listdir(folder)) if folder.exists() else set()
        if not all(image_name(split, number) in there for number in range(done)):
            done = None
    if done == images:
        return done  # all that is left to do is to give the final names
    for path in (paths.scenes, paths.images):
        if path.exists() and not force:
            if not first:
                paths.journal.unlink()
            raise InputError(f"{path} exists already; choose another folder or split, or replace it with --force")
    if done is None:
        if first:
            print(f"{paths.journal} was of other settings or code: starting again", file=sys.stderr)
        if paths.partial.exists():
            shutil.rmtree(paths.partial)
        journal.seek(0)
        journal.truncate()
        _write_journal(journal, [header])
        done = 0
    elif done:
        print(f"{paths.journal} goes on after {done} of {images} images", file=sys.stderr)
    make_folder(paths.partial)
    return done


def _whole_lines(journal: BinaryIO) -> int:
    """Counts the lines from here on; one that an interruption cut short is removed."""
    count, end = 0, journal.tell()
    for line in journal:
        if not line.endswith(b"\n"):
            break
        count, end = count + 1, end + len(line)
    journal.seek(end)
    journal.truncate()
    return count


def _write_journal(journal: BinaryIO, lines: Iterable[str]) -> None:
    """Appends lines; they lie on the disk when this returns or raises, and now and then before."""
    committed = time.monotonic()
    try:
        for line in lines:
            journal.write(line.encode() + b"\n")
            if time.monotonic() - committed > SECONDS_BETWEEN_COMMITS:
                _sync(journal)
                committed = time.monotonic()
    finally:
        _sync(journal)


def _sync(journal: BinaryIO) -> None:
    journal.flush()
    os.fsync(journal.fileno())


def _publish(paths: _Paths, split: str, info: dict[str, Any]) -> None:
    """Gives everything its final name, the scenes last: who finds them finds the rest."""
    if paths.partial.exists():  # else an interruption came after this
        paths.scenes.unlink(missing_ok=True)
        if paths.images.exists():
            shutil.rmtree(paths.images)
        publish(paths.partial, paths.images)
    waiting = paths.cameras.with_name(paths.cameras.name + ".partial")
    with locked(waiting):  # against another split that is completed at the same time
        _write_lines(waiting, paths.cameras, _cameras(paths, split))
    _write_lines(paths.scenes.with_name(paths.scenes.name + ".new"), paths.scenes, _scenes(paths, info))
    paths.journal.unlink()


def _cameras(paths: _Paths, split: str) -> Iterator[str]:
    """The lines of other splits, then those of this one."""
    if paths.cameras.exists():
        try:
            lines = paths.cameras.read_text().splitlines()  # the last one may lack its end
            yield from (line + "\n" for line in lines if json.loads(line).get("split") != split)
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{paths.cameras} is not a file of cameras ({error}); move it away") from error
    yield from (json.dumps(camera) + "\n" for _, camera in _records(paths))


def _scenes(paths: _Paths, info: dict[str, Any]) -> Iterator[str]:
    """The document of the scenes, piece by piece: 70,000 scenes as Python objects would take gigabytes."""
    yield f'{{"info": {json.dumps(info)}, "scenes": ['
    for number, (scene, _) in enumerate(_records(paths)):
        yield (", " if number else "") + json.dumps(scene)
    yield "]}\n"


def _records(paths: _Paths) -> Iterator[list[dict[str, Any]]]:
    with open(paths.journal) as journal:
        next(journal)
        yield from map(json.loads, journal)


def _write_lines(partial: Path, final: Path, lines: Iterable[str]) -> None:
    with open(partial, "w") as file:
        file.writelines(lines)
    publish(partial, final)
