"""Trees in aerial pictures: boxes that people drew, from the four annotated pictures in the wheel of deepforest 2.1.0.

    pip download deepforest==2.1.0 --no-deps

Two pictures (Yellowstone; 853 trees) are for training and the choice of the epoch, except for a strip of each, which is
for the test, as are the two others (61 trees in Florida, 37 in California). A gap wider than any tree separates the
test strips from the rest. Pictures are cut to tiles of 128 pixels; a tree belongs to a tile with at least half its box.
"""

from __future__ import annotations

import io
import itertools
import math
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torchvision.ops import nms

from benchmarks.own_data.splits import Objects, images_of, objects_of, scores, table_of, write_split

WHEEL = "deepforest-2.1.0-py3-none-any.whl"
TILE = 128
# rows of each picture by split
PARTS = {
    "2019_YELL_2_528000_4978000_image_crop2": {"train": (0, 1464), "val": (1464, 1848), "strips": (1960, 2472)},
    "2019_YELL_2_541000_4977000_image_crop": {"train": (0, 667), "strips": (779, 1035)},
    "OSBS_029": {"florida": (0, 400)},
    "SOAP_061": {"california": (0, 400)},
}
TESTS = ("strips", "florida", "california")
THRESHOLDS = (8.0,)  # pixels
# of the blobs: scales in pixels, and channels as weights of red, green and blue
SCALES = (5.7, 8.0, 11.3, 16.0, 22.6)
CHANNELS = {
    "brightness": (1 / 3, 1 / 3, 1 / 3),
    "greenness": (-0.5, 1.0, -0.5),
    "yellowness": (0.5, 0.5, -1.0),
    "redness": (1.0, -1.0, 0.0),
}


def make(folder: Path, wheel: Path) -> None:
    """Write the tiles of each split into `folder`; those of training overlap by half and come in eight orientations."""
    tiles: dict[str, list[tuple[Image.Image, Objects]]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, parts in PARTS.items():
            image, boxes = annotated(archive, name)
            for split, rows in parts.items():
                training = split == "train"
                for tile, inside in cut(image, boxes, rows, TILE // 2 if training else TILE):
                    turns = oriented(tile, inside) if training else [(tile, inside)]
                    tiles.setdefault(split, []).extend((Image.fromarray(t), objects(b)) for t, b in turns)
    for split, found in tiles.items():
        write_split(folder / split, found)


def annotated(archive: zipfile.ZipFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 `[height, width, 3]` and its boxes float64 `[trees, 4]`: left, top, right, bottom in pixels."""
    picture = archive.read(f"deepforest/data/{name}.png")
    tree = ElementTree.fromstring(archive.read(f"deepforest/data/{name}.xml"))
    boxes = [[float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")] for box in tree.iter("bndbox")]
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")), np.array(boxes)


def cut(
    image: np.ndarray, boxes: np.ndarray, rows: tuple[int, int], stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tiles within some rows of a picture, each with the visible parts of its trees, in pixels of the tile."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for top in range(rows[0], rows[1] - TILE + 1, stride):
        for left in range(0, image.shape[1] - TILE + 1, stride):
            visible = (boxes - [left, top, left, top]).clip(0, TILE)
            inside = (visible[:, 2:] - visible[:, :2]).prod(1) >= 0.5 * areas
            yield image[top : top + TILE, left : left + TILE], visible[inside]


def oriented(tile: np.ndarray, boxes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The eight flips and quarter turns of a tile and its boxes."""
    for _ in range(4):
        tile = np.rot90(tile)
        left, top, right, bottom = boxes.T
        boxes = np.stack([top, TILE - right, bottom, TILE - left], 1)
        yield tile, boxes
        left, top, right, bottom = boxes.T
        yield tile[:, ::-1], np.stack([TILE - right, top, TILE - left, bottom], 1)


def objects(boxes: np.ndarray) -> Objects:
    """Boxes as rows of the table."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    return [dict(zip(sides, map(float, box), strict=True)) | {"label": "Tree"} for box in boxes]


def source(folder: Path, split: str) -> tuple[str | Path, ...]:
    """The options of `setpred data import` for a split."""
    return table_of(folder, split)


def baselines(folder: Path) -> dict[str, dict[str, list[Objects]]]:
    """Boxes of mean size on a grid, at least as many as a training tile has on average; and a detector of blobs.

    Channel, sign and the side of a box in units of the blob's scale are the best on the validation tiles.
    """
    truth = objects_of(folder, "train")
    extent = np.mean([tree["extent"] for trees in truth for tree in trees], 0).tolist()
    side = math.ceil(np.mean([len(trees) for trees in truth]) ** 0.5)
    places = (np.arange(side) + 0.5) * TILE / side
    grid = [_tree([x, y], extent, 1.0) for y in places for x in places]

    def found(split: str, *choice: Any) -> list[Objects]:
        return [blobs(image, *choice) for image in images_of(folder, split)]

    def score(choice: tuple[str, int, float]) -> float:
        return scores(folder, "val", found("val", *choice))["box_ap"]["AP50"]

    best = max(itertools.product(CHANNELS, (1, -1), (2.0, 2.8, 3.6)), key=score)
    print(f"blobs: {best[0]}, sign {best[1]}, side {best[2]} of the scale")
    return {
        "boxes of mean size on a grid": {split: [grid] * len(images_of(folder, split)) for split in TESTS},
        "blobs": {split: found(split, *best) for split in TESTS},
    }


def blobs(image: np.ndarray, channel: str, sign: int, side: float) -> Objects:
    """Find bright (sign 1) or dark (-1) blobs of a channel.

    They are maxima, over place and scale σ, of -σ² times the Laplacian of a Gaussian; a box has sides of `side` σ.
    """
    grey = sign * (image / 255.0) @ np.array(CHANNELS[channel])
    responses = np.stack([-(scale**2) * ndimage.gaussian_laplace(grey, scale, mode="nearest") for scale in SCALES])
    peaks = (responses == ndimage.maximum_filter(responses, (3, 5, 5))) & (responses > 0.01)
    scale, y, x = peaks.nonzero()
    strength, half = responses[peaks], side / 2 * np.array(SCALES)[scale, None]
    centres = np.stack([x, y], 1) + 0.5
    corners = np.concatenate([centres - half, centres + half], 1).clip(0, TILE)
    kept = nms(torch.from_numpy(corners), torch.from_numpy(strength), 0.3).tolist()
    return [
        _tree(((box[:2] + box[2:]) / 2).tolist(), (box[2:] - box[:2]).tolist(), float(strength[i]))
        for i, box in ((i, corners[i]) for i in kept)
    ]


def _tree(centre: list[float], extent: list[float], confidence: float) -> dict[str, Any]:
    return {"coords": centre, "extent": extent, "label": "Tree", "confidence": confidence}
