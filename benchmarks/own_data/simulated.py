"""Simulated sets of points, whose clusters are to be found, and spectra, whose peaks are.

Clusters: sets of points -> centres and kinds, against DBSCAN. Spectra: vectors -> positions and heights, against
`find_peaks`. The numbers of a baseline are chosen on training examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from sklearn.cluster import DBSCAN

from benchmarks.own_data.splits import Objects, scores
from setpred.data.arrays import read_arrays

Arrays = dict[str, np.ndarray]

SPLITS = {"train": 6000, "val": 500, "test": 1000}
TUNED = 300  # training examples on which a baseline's numbers are chosen
LENGTH = 128  # of a spectrum


def padded(rows: Sequence[np.ndarray], fill: Any = np.nan) -> np.ndarray:
    """Arrays of different lengths in one, filled up."""
    most = max(map(len, rows))
    found = np.full((len(rows), most, *rows[0].shape[1:]), fill, rows[0].dtype)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return found


def apart(
    count: int, low: Sequence[float], high: Sequence[float], least: float, rng: np.random.Generator
) -> np.ndarray:
    """Places `[count, d]` in a box, no two nearer than `least`."""
    found: list[np.ndarray] = []
    while len(found) < count:
        place = rng.uniform(low, high)
        if all(np.linalg.norm(place - other) > least for other in found):
            found.append(place)
    return np.array(found)


def clusters(count: int, rng: np.random.Generator) -> Arrays:
    """1 to 6 clusters of 8 to 12 points, normal (deviation 0.3) or on a ring (radius 0.6), and up to 8 stray points."""
    inputs, coords, kinds = [], [], []
    for _ in range(count):
        centres = apart(int(rng.integers(1, 7)), (-4, -4), (4, 4), 1.6, rng)
        points, kind = [rng.uniform(-5, 5, (rng.integers(0, 9), 2))], rng.choice(["blob", "ring"], len(centres))
        for centre, name in zip(centres, kind, strict=True):
            size = rng.integers(8, 13)
            turns = rng.uniform(0, 2 * np.pi, size)
            ring = 0.6 * np.stack([np.cos(turns), np.sin(turns)], axis=-1) + rng.normal(0, 0.06, (size, 2))
            points.append(centre + (ring if name == "ring" else rng.normal(0, 0.3, (size, 2))))
        inputs.append(rng.permutation(np.concatenate(points)))
        coords.append(centres)
        kinds.append(kind)
    return {"inputs": padded(inputs), "coords": padded(coords), "kind": padded(kinds, "")}


def dbscan(arrays: Arrays, reach: float, least: int) -> list[Objects]:
    """Clusters of DBSCAN: means of their points; a ring where the distances from the mean are nearly equal."""
    found = []
    for points in arrays["inputs"]:
        points = points[~np.isnan(points[:, 0])]
        labels = DBSCAN(eps=reach, min_samples=least).fit(points).labels_
        objects = []
        for label in range(labels.max(initial=-1) + 1):
            members = points[labels == label]
            centre = members.mean(0)
            radii = np.linalg.norm(members - centre, axis=1)
            kind = "ring" if radii.std() < 0.3 * radii.mean() else "blob"
            objects.append({"coords": centre.tolist(), "kind": kind, "confidence": 1 - 1 / len(members)})
        found.append(objects)
    return found


def spectra(count: int, rng: np.random.Generator) -> Arrays:
    """Vectors of 128 numbers: 1 to 5 peaks, on a slope and with noise of deviation 0.05.

    Peaks are normal, of deviation 1.5 to 3.5, and at least 4 apart: near ones overlap.
    """
    inputs, coords, heights, axis = [], [], [], np.arange(LENGTH)
    for _ in range(count):
        places = apart(int(rng.integers(1, 6)), (6,), (LENGTH - 7,), 4, rng)
        height, width = rng.uniform(0.3, 1.5, len(places)), rng.uniform(1.5, 3.5, len(places))
        peaks = height * np.exp(-0.5 * ((axis[:, None] - places[:, 0]) / width) ** 2)
        slope = rng.uniform(0, 0.3) + rng.uniform(-0.2, 0.2) * axis / LENGTH
        inputs.append(peaks.sum(1) + slope + rng.normal(0, 0.05, LENGTH))
        coords.append(places)
        heights.append(height)
    return {"inputs": np.array(inputs), "coords": padded(coords), "height": padded(heights)}


def highest(arrays: Arrays, width: float, prominence: float) -> list[Objects]:
    """Peaks of `scipy.signal.find_peaks` in the smoothed vector; the height is the prominence."""
    found = []
    for vector in arrays["inputs"]:
        smooth = gaussian_filter1d(vector, width)
        places, about = find_peaks(smooth, prominence=prominence)
        peaks = zip(places.tolist(), about["prominences"].tolist(), strict=True)
        found.append([{"coords": place, "height": size, "confidence": size} for place, size in peaks])
    return found


@dataclass(frozen=True)
class Simulated:
    """A proof: its examples, and a plain method with the choices of its two numbers."""

    simulate: Callable[[int, np.random.Generator], Arrays]
    method: Callable[..., list[Objects]]
    choices: tuple[Iterable[float], Iterable[float]]
    name: str
    TESTS = ("test",)
    THRESHOLDS = ()

    def make(self, folder: Path) -> None:
        """Write the arrays of every split."""
        folder.mkdir(parents=True, exist_ok=True)
        for seed, (split, count) in enumerate(SPLITS.items()):
            np.savez(folder / f"{split}.npz", **self.simulate(count, np.random.default_rng(seed)))

    def source(self, folder: Path, split: str) -> tuple[str | Path, ...]:
        """The options of `setpred data import` for a split."""
        return "--npz", folder / f"{split}.npz"

    def baselines(self, folder: Path) -> dict[str, dict[str, list[Objects]]]:
        """The objects that the plain method finds, with the numbers of the best mean AP on training examples."""
        few = {name: values[:TUNED] for name, values in read_arrays(folder / "train.npz").items()}

        def score(numbers: tuple[float, ...]) -> float:
            return float(
                np.mean(list(scores(folder, "train", self.method(few, *numbers), images=TUNED)["ap"].values()))
            )

        best = max(itertools.product(*self.choices), key=score)
        named = f"{self.name} ({', '.join(f'{number:g}' for number in best)})"
        return {named: {"test": self.method(read_arrays(folder / "test.npz"), *best)}}


CLUSTERS = Simulated(clusters, dbscan, ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (2, 3, 4, 5, 6)), "DBSCAN")
SPECTRA = Simulated(spectra, highest, ((0.5, 1.0, 1.5, 2.0), (0.05, 0.1, 0.15, 0.2, 0.3)), "find_peaks")
