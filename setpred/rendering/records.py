"""Scenes as JSON, both ways: records of `CLEVR_SPLIT_scenes.json`, and lines with the locations of camera and lamps,
which CLEVR does not publish.

Source: the official generator (see `sampling`) and its scene files.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from setpred.errors import InputError
from setpred.rendering.camera import Camera, fit_camera
from setpred.rendering.sampling import DIRECTIONS
from setpred.rendering.scenes import NOMINAL_LAMPS, Scene, SceneObject

NOT_RELATED = 0.2  # largest distance along a direction that does not count as a relation
Lamps = Mapping[str, tuple[float, float, float]]  # locations by name
LAMPS = {"Lamp_Key": "key", "Lamp_Back": "back", "Lamp_Fill": "fill"}


WORLD_DIRECTIONS: dict[str, list[float]] = {}  # those of the unjittered camera, as CLEVR writes them into every scene
for _name, _opposite, _direction in (
    ("behind", "front", [*DIRECTIONS[1].tolist(), 0.0]),
    ("left", "right", [*(-DIRECTIONS[0]).tolist(), 0.0]),
    ("above", "below", [0.0, 0.0, 1.0]),
):
    WORLD_DIRECTIONS |= {_name: _direction, _opposite: [-value for value in _direction]}


def scene_record(scene: Scene, *, index: int, split: str, width: int = 480, height: int = 320) -> dict[str, Any]:
    """Convert a scene to CLEVR's record, for an image of `width` x `height`."""
    coords = np.array([obj.coords for obj in scene.objects]).reshape(-1, 3)
    pixels = scene.camera.project(coords, width, height).tolist()
    return {
        "split": split,
        "image_index": index,
        "image_filename": image_name(split, index),
        "objects": [
            {name: getattr(obj, name) for name in ("shape", "size", "material")}
            | {"3d_coords": list(obj.coords), "rotation": obj.rotation}
            | {"pixel_coords": [round(px), round(py), depth], "color": obj.color}
            for obj, (px, py, depth) in zip(scene.objects, pixels, strict=True)
        ],
        "directions": {name: list(direction) for name, direction in WORLD_DIRECTIONS.items()},
        "relationships": relationships(coords),
    }


def image_name(split: str, index: int) -> str:
    """CLEVR's file name of an image."""
    return f"CLEVR_{split}_{index:06d}.png"


def relationships(coords: np.ndarray) -> dict[str, list[list[int]]]:
    """Indices of the objects behind, in front, left and right of each object of `coords` `[n, 3]`.

    Object j is left of object i if (p_j - p_i) . left > 0.2, and so on.
    """
    apart = coords[None] - coords[:, None]
    related = {name: apart @ WORLD_DIRECTIONS[name] > NOT_RELATED for name in ("behind", "front", "left", "right")}
    return {name: [np.flatnonzero(row).tolist() for row in rows] for name, rows in related.items()}


def scene_of(
    record: Mapping[str, Any],
    camera: Camera | None = None,
    lamps: Lamps | None = None,
    *,
    width: int = 480,
    height: int = 320,
) -> Scene:
    """Convert CLEVR's record to a scene.

    Args:
        camera: the camera; by default fitted to `pixel_coords`, which refer to an image of `width` x `height`.
        lamps: locations of `key`, `fill` and `back`; by default those without jitter.

    Raises:
        InputError: an invalid record, or objects that do not determine the camera.
    """
    name = record.get("image_filename", "a scene")
    try:
        objects = tuple(
            SceneObject(
                tuple(float(obj["3d_coords"][axis]) for axis in range(3)),
                float(obj["rotation"]),
                *(obj[name] for name in ("material", "color", "shape", "size")),
            )
            for obj in record["objects"]
        )
        if not np.isfinite([number for obj in objects for number in (*obj.coords, obj.rotation)]).all():
            raise ValueError("a non-finite number")
        if camera is None:
            pixels = np.array([obj["pixel_coords"] for obj in record["objects"]], dtype=np.float64)
            camera = fit_camera(np.array([obj.coords for obj in objects]), pixels, width, height)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{name}: expected a scene in CLEVR's format, got {error!r}") from error
    if camera is None:
        raise InputError(f"{name}: its {len(objects)} objects do not determine the camera; pass `camera`")
    return Scene(objects, camera, dict(NOMINAL_LAMPS if lamps is None else lamps))


def camera_record(scene: Scene, *, index: int, split: str) -> dict[str, Any]:
    """Locations of a scene's camera and lamps, in plain types.

    `camera_matrix` `[4, 4]` maps camera coordinates (right, up, backward) to world coordinates.
    """
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scene.camera.axes().T, scene.camera.location
    return {
        "image_index": index,
        "split": split,
        "camera": list(scene.camera.location),
        "camera_matrix": matrix.tolist(),
        "lights": {lamp: list(scene.lamps[name]) for lamp, name in LAMPS.items()},
    }


def read_cameras(path: str | os.PathLike[str], *, split: str | None = None) -> dict[int, tuple[Camera, Lamps]]:
    """Load cameras and lamps by image index from a file with a `camera_record` in each line.

    Args:
        split: skip lines that name another split.

    Raises:
        InputError: an unreadable or invalid file.
    """
    found, number = {}, 0
    try:
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            number += 1
            record = json.loads(line)
            if split is None or record.get("split", split) == split:
                lamps = {name: _three(record["lights"][lamp]) for lamp, name in LAMPS.items()}
                found[int(record["image_index"])] = Camera(_three(record["camera"])), lamps
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)} ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{os.fspath(path)}, line {number}: expected camera and lights, got {error!r}") from error
    return found


def _three(values: Any) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    if not np.isfinite((x, y, z)).all():
        raise ValueError(f"expected three finite numbers, got {values}")
    return x, y, z
