"""Prove "your own data" on sets and vectors: simulate data, run the commands of docs/own_data.md, score a baseline.

    python -m benchmarks.own_sets clusters FOLDER    # sets of points -> centres of clusters and their kind
    python -m benchmarks.own_sets spectra FOLDER     # vectors -> positions and heights of peaks

FOLDER gets the arrays, the prepared files, the run, the scores and the figures. The commands are printed as they run;
each is one that a user types. The numbers of a baseline are chosen on training examples. docs/results.md has the
tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from sklearn.cluster import DBSCAN

from benchmarks.tables import markdown
from setpred.data.arrays import read_arrays
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import file_header
from setpred.errors import InputError
from setpred.evaluation import Predictions, report

Arrays = dict[str, np.ndarray]
Objects = list[dict[str, Any]]  # of an example: values by field, and a "confidence"

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
class Proof:
    """A task: its examples, and a plain method with the choices of its two numbers."""

    make: Callable[[int, np.random.Generator], Arrays]
    baseline: Callable[..., list[Objects]]
    choices: tuple[Iterable[float], Iterable[float]]
    name: str


PROOFS = {
    "clusters": Proof(clusters, dbscan, ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (2, 3, 4, 5, 6)), "DBSCAN"),
    "spectra": Proof(spectra, highest, ((0.5, 1.0, 1.5, 2.0), (0.05, 0.1, 0.15, 0.2, 0.3)), "find_peaks"),
}


def command(*arguments: str | Path) -> None:
    """Run a `setpred` command in a process of its own, as a user would; raise `InputError` if it fails."""
    words = [str(word) for word in arguments]
    print("$ setpred " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, "-m", "setpred", *words]).returncode:
        raise InputError(f"`setpred {shlex.join(words)}` failed")


def learn(folder: Path, name: str) -> dict[str, Any]:
    """Import every split, train on two and evaluate on the third; return the report."""
    for split in SPLITS:
        command("data", "import", "--npz", folder / f"{split}.npz", "--out", folder / f"{split}.h5", "--force")
    command("train", "--data", folder / "train.h5", "--val", folder / "val.h5", "--runs", folder, "--name", name)
    shown = ("--json", folder / "test.json", "--figures", folder / "figures")
    command("evaluate", folder / name / "best.ckpt", "--data", folder / "test.h5", *shown)
    return json.loads((folder / "test.json").read_text())


def scores(folder: Path, split: str, found: Sequence[Objects], examples: int | None = None) -> dict[str, Any]:
    """Score objects found without the library, by the report of `setpred evaluate`."""
    data = SetFile(folder / f"{split}.h5", schema=file_header(folder / "train.h5").schema, images=examples)
    target = data.__getitems__(range(len(data)))["elements"]
    predicted = np.stack([data.schema.encode(objects, max(1, *map(len, found))) for objects in found])
    for elements, objects in zip(predicted, found, strict=True):
        elements[: len(objects), -1] = [values["confidence"] for values in objects]
    return report(Predictions(torch.from_numpy(predicted), target, torch.arange(len(target))), data.schema, "dataset")


def tuned(proof: Proof, folder: Path) -> tuple[float, ...]:
    """The numbers of a baseline with the best mean AP on training examples."""
    few = {name: values[:TUNED] for name, values in read_arrays(folder / "train.npz").items()}

    def score(numbers: tuple[float, ...]) -> float:
        return float(np.mean(list(scores(folder, "train", proof.baseline(few, *numbers), TUNED)["ap"].values())))

    return max(itertools.product(*proof.choices), key=score)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_sets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    proof, folder = PROOFS[options.proof], options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(SPLITS.items()):
        np.savez(folder / f"{split}.npz", **proof.make(count, np.random.default_rng(seed)))
    try:
        learned = learn(folder, options.proof)
        numbers = tuned(proof, folder)
        found = proof.baseline(read_arrays(folder / "test.npz"), *numbers)
        named = f"{proof.name} ({', '.join(f'{number:g}' for number in numbers)})"
        reports: Mapping[str, dict[str, Any]] = {
            "default model": learned,
            named: scores(folder, "test", found),
        }
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = [[name, *(f"{100 * score:.1f}" for score in each["ap"].values())] for name, each in reports.items()]
    titles = ("", *learned["ap"])
    print(markdown(titles, lines, numbers=range(1, len(titles))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
