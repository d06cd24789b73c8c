"""Scenes in CLEVR's JSON form, both ways: the records of `CLEVR_SPLIT_scenes.json`, and lines that say where camera
and lamps stood, which CLEVR itself does not publish.

Source: the official generator (see `sampling`) and the scene files that it wrote.
"""

from __future__ import annotations

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

NOT_RELATED = 0.2  # objects that lie no further than this along a direction are not related by it
LAMPS = {"Lamp_Key": "key", "Lamp_Back": "back", "Lamp_Fill": "fill"}


def _directions() -> dict[str, list[float]]:
    right, behind = DIRECTIONS.tolist()
    left = [-right[0], -right[1], 0.0]
    found = {"behind": [*behind, 0.0], "left": left, "above": [0.0, 0.0, 1.0]}
    opposite = {"front": "behind", "right": "left", "below": "above"}
    found |= {name: [-value for value in found[other]] for name, other in opposite.items()}
    return {name: found[name] for name in ("behind", "front", "left", "right", "above", "below")}


WORLD_DIRECTIONS = _directions()  # CLEVR writes these into every scene, however the camera was moved


def scene_record(
    scene: Scene, *, index: int, split: str, width: int = 480, height: int = 320, file_name: str | None = None
) -> dict[str, Any]:
    """The record of a scene as CLEVR writes it, for an image of `width` x `height`.

    Args:
        file_name: of the image; `CLEVR_SPLIT_000000.png` with the index in it unless given.
    """
    coords = np.array([obj.coords for obj in scene.objects]).reshape(-1, 3)
    pixels = scene.camera.project(coords, width, height).tolist()
    return {
        "split": split,
        "image_index": index,
        "image_filename": image_name(split, index) if file_name is None else file_name,
        "objects": [
            {
                "shape": obj.shape,
                "size": obj.size,
                "material": obj.material,
                "3d_coords": list(obj.coords),
                "rotation": obj.rotation,
                "pixel_coords": [round(px), round(py), depth],
                "color": obj.color,
            }
            for obj, (px, py, depth) in zip(scene.objects, pixels, strict=True)
        ],
        "directions": {name: list(direction) for name, direction in WORLD_DIRECTIONS.items()},
        "relationships": relationships(coords),
    }


def image_name(split: str, index: int) -> str:
    return f"CLEVR_{split}_{index:06d}.png"


def relationships(coords: np.ndarray) -> dict[str, list[list[int]]]:
    """For behind, front, left and right: for each object of `coords` `[n, 3]`, which others are that of it.

    Object j is left of object i if (p_j - p_i) . left > 0.2, and so on.
    """
    apart = coords[None] - coords[:, None]
    related = {name: apart @ WORLD_DIRECTIONS[name] > NOT_RELATED for name in ("behind", "front", "left", "right")}
    return {name: [np.flatnonzero(row).tolist() for row in rows] for name, rows in related.items()}


def scene_of(
    record: Mapping[str, Any],
    camera: Camera | None = None,
    lamps: Mapping[str, tuple[float, float, float]] | None = None,
    *,
    width: int = 480,
    height: int = 320,
) -> Scene:
    """The scene of a record.

    Args:
        camera: where it stood; unless given it is found from `pixel_coords`, which count in `width` x `height`.
        lamps: where `key`, `fill` and `back` stood; unless given, where they stand without jitter.

    Raises:
        InputError: something is missing in the record, or its objects do not determine the camera.
    """
    name = record.get("image_filename", "a scene")
    try:
        objects = tuple(
            SceneObject(
                coords=(float(obj["3d_coords"][0]), float(obj["3d_coords"][1]), float(obj["3d_coords"][2])),
                rotation=float(obj["rotation"]),
                material=obj["material"],
                color=obj["color"],
                shape=obj["shape"],
                size=obj["size"],
            )
            for obj in record["objects"]
        )
        if not np.isfinite([number for obj in objects for number in (*obj.coords, obj.rotation)]).all():
            raise ValueError("a number that is not finite")
        if camera is None:
            pixels = np.array([obj["pixel_coords"] for obj in record["objects"]], dtype=np.float64)
            camera = fit_camera(np.array([obj.coords for obj in objects]), pixels, width, height)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{name} is not a scene as CLEVR writes it ({error!r}); see setpred.rendering.records"
        ) from error
    if camera is None:
        raise InputError(f"{name}: its {len(objects)} objects do not determine the camera; say where it stood")
    return Scene(objects, camera, dict(NOMINAL_LAMPS if lamps is None else lamps))


def camera_record(scene: Scene, *, index: int, split: str) -> dict[str, Any]:
    """Where camera and lamps of a scene stood, in plain types.

    `camera_matrix` `[4, 4]` takes camera coordinates (right, up, backward) to the world's.
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


def read_cameras(
    path: str | os.PathLike[str], *, split: str | None = None
) -> dict[int, tuple[Camera, dict[str, tuple[float, float, float]]]]:
    """Camera and lamps by image index, from a file with a `camera_record` in each line.

    Args:
        split: lines of this split, and lines that name none; all lines unless given.

    Raises:
        InputError: the file cannot be read or has another content.
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
        raise ValueError(f"three finite numbers are expected, not {values}")
    return x, y, z
