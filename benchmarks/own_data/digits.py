"""Scenes of 3 to 8 handwritten digits on a shaded, noisy background: position, size and class of each.

The ink is scikit-learn's 8x8 digits. Scenes of different splits share no digit: the first 1,097 are for training, the
next 200 for the choice of the epoch, and the last 500 for the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from benchmarks.own_data.splits import Objects, images_of, objects_of, scores, table_of, write_split
from setpred.data.toy.digits import Digits, bundled_digits

SIDE = 64  # of a scene, in pixels
SIZES = (10, 20)  # of a digit
COUNTS = (3, 8)
OVERLAP = 0.15  # of the smaller one's area, at most
TRAINING = 1097  # digits
SCENES = {"train": 6000, "val": 500, "test": 1000}
TESTS = ("test",)
THRESHOLDS = (2.0,)  # pixels


def inks() -> dict[str, Digits]:
    """The digits of each split."""
    first, last = bundled_digits("train"), bundled_digits("val")
    parts = {"train": slice(TRAINING), "val": slice(TRAINING, None)}
    return {split: Digits(first.images[part], first.classes[part]) for split, part in parts.items()} | {"test": last}


def make(folder: Path, scenes: dict[str, int] = SCENES) -> None:
    """Write the scenes of each split into `folder`."""
    for seed, (split, ink) in enumerate(inks().items()):
        rng = np.random.default_rng(seed)
        write_split(folder / split, (scene(ink, rng) for _ in range(scenes[split])))


def scene(ink: Digits, rng: np.random.Generator) -> tuple[Image.Image, Objects]:
    """Draw one scene; return it with its objects."""
    places = _places(int(rng.integers(COUNTS[0], COUNTS[1] + 1)), rng)
    shade = ndimage.zoom(rng.uniform(0.0, 0.3, (3, 3)), SIDE / 3, order=1)
    drawn, objects = np.zeros((SIDE, SIDE)), []
    for left, top, size in places:
        index = int(rng.integers(len(ink.images)))
        patch = np.asarray(Image.fromarray(ink.images[index]).resize((size, size), Image.Resampling.BICUBIC))
        place = np.s_[top : top + size, left : left + size]
        drawn[place] = np.maximum(drawn[place], rng.uniform(0.6, 1.0) * patch.clip(0, 1))
        centre = {"x": left + size / 2, "y": top + size / 2}
        objects.append(centre | {"size": size, "digit": int(ink.classes[index])})
    pixels = np.maximum(shade, drawn) + rng.normal(0, 0.05, drawn.shape)
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)), objects


def _places(count: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Left, top and size of `count` squares in the scene that overlap little."""
    while True:  # until a scene is not too full
        placed: list[tuple[int, int, int]] = []
        for _ in range(200):
            size = int(rng.integers(SIZES[0], SIZES[1] + 1))
            left, top = (int(place) for place in rng.integers(0, SIDE - size + 1, 2))
            if all(_overlap((left, top, size), other) <= OVERLAP for other in placed):
                placed.append((left, top, size))
            if len(placed) == count:
                return placed


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    width, height = (max(min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i]), 0) for i in (0, 1))
    return width * height / min(a[2], b[2]) ** 2


def source(folder: Path, split: str) -> tuple[str | Path, ...]:
    """The options of `setpred data import` for a split."""
    return *table_of(folder, split), "--categorical", "digit"


def baselines(folder: Path) -> dict[str, dict[str, list[Objects]]]:
    """Connected components of the ink, classified by the five nearest neighbours.

    The neighbours are the components of 2,000 training scenes whose centre is within 3 pixels of one digit's. The
    threshold of the ink is the best of four on the validation scenes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    training = list(zip(images_of(folder, "train"), objects_of(folder, "train"), strict=True))[:2000]

    def fitted(threshold: float) -> KNeighborsClassifier:
        patches, classes = [], []
        for image, objects in training:
            centres = np.array([values["coords"] for values in objects])
            for centre, _, patch in components(image, threshold):
                (near,) = (np.hypot(*(centres - centre).T) < 3).nonzero()
                if len(near) == 1:
                    patches.append(patch)
                    classes.append(objects[near[0]]["digit"])
        return KNeighborsClassifier(5, weights="distance").fit(patches, classes)

    def found(split: str, threshold: float, classifier: KNeighborsClassifier) -> list[Objects]:
        return [_classified(image, threshold, classifier) for image in images_of(folder, split)]

    tried = [(threshold, fitted(threshold)) for threshold in (0.15, 0.2, 0.25, 0.3)]
    best = max(tried, key=lambda pair: scores(folder, "val", found("val", *pair))["ap"]["inf"])
    return {"components and nearest neighbours": {"test": found("test", *best)}}


def _classified(image: np.ndarray, threshold: float, classifier: Any) -> Objects:
    parts = components(image, threshold)
    shares = classifier.predict_proba([patch for _, _, patch in parts]) if parts else []
    return [
        {"coords": centre, "size": size, "digit": str(classifier.classes_[share.argmax()]), "confidence": share.max()}
        for (centre, size, _), share in zip(parts, shares, strict=True)
    ]


def components(image: np.ndarray, threshold: float) -> list[tuple[list[float], float, np.ndarray]]:
    """Centre, size and 8x8 patch of each connected region brighter than its surroundings by `threshold`."""
    bright = image / 255.0
    smooth = ndimage.gaussian_filter(bright, 0.7)
    shade = ndimage.uniform_filter(ndimage.minimum_filter(ndimage.gaussian_filter(bright, 2.0), 17), 17)
    labels, _ = ndimage.label(smooth - shade > threshold, np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if (labels[rows, columns] == number).sum() < 8 or height < 4:
            continue
        size = max(height, width)
        square = np.zeros((size, size), np.float32)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = (smooth * (labels == number))[rows, columns]
        patch = np.asarray(Image.fromarray(square / square.max()).resize((8, 8), Image.Resampling.BILINEAR))
        centre = [(columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2]
        found.append((centre, float(size), patch.ravel()))
    return found
