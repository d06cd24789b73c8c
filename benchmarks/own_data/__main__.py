"""Prove "your own data": make a data set, run the commands of the README on it, score a plain baseline.

    python -m benchmarks.own_data digits FOLDER
    python -m benchmarks.own_data trees FOLDER --wheel deepforest-2.1.0-py3-none-any.whl
    python -m benchmarks.own_data clusters FOLDER    # sets of points -> centres of clusters and their kind
    python -m benchmarks.own_data spectra FOLDER     # vectors -> positions and heights of peaks

FOLDER gets the images and tables or the arrays, the prepared files, the run, the scores and the figures. The commands
are printed as they run; each is one that a user types. docs/results.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.own_data import digits, trees
from benchmarks.own_data.simulated import CLUSTERS, SPECTRA
from benchmarks.own_data.splits import scores
from benchmarks.tables import markdown
from setpred.errors import InputError

PROOFS: dict[str, Any] = {"digits": digits, "trees": trees, "clusters": CLUSTERS, "spectra": SPECTRA}
TRAINING = ("train", "val")  # splits of which the training reads


def command(*arguments: str | Path) -> None:
    """Run a `setpred` command in a new process, as a user would.

    Raises:
        InputError: it failed.
    """
    words = [str(word) for word in arguments]
    print("$ setpred " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, "-m", "setpred", *words]).returncode:
        raise InputError(f"`setpred {shlex.join(words)}` failed")


def learn(proof: Any, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Import every split, train on the first two and evaluate on the others; return the report of each."""
    for split in (*TRAINING, *proof.TESTS):
        command("data", "import", *proof.source(folder, split), "--out", folder / f"{split}.h5")
    data = ("--data", folder / "train.h5", "--val", folder / "val.h5")
    command("train", *data, "--runs", folder, "--name", name)
    found = {}
    for split in proof.TESTS:
        report = folder / f"{split}.json"
        distances = ("--thresholds", *map(str, proof.THRESHOLDS)) if proof.THRESHOLDS else ()
        shown = ("--json", report, "--figures", folder / "figures" / split)
        command("evaluate", folder / name / "best.ckpt", "--data", folder / f"{split}.h5", *distances, *shown)
        found[split] = json.loads(report.read_text())
    return found


def table(proof: Any, folder: Path, learned: dict[str, dict[str, Any]]) -> str:
    """AP in % of the model and of the baselines: at each distance, and of boxes where the objects have some."""
    reports = {"setpred, default model": learned}
    for name, found in proof.baselines(folder).items():
        reports[name] = {split: scores(folder, split, objects, proof.THRESHOLDS) for split, objects in found.items()}
    boxes = [score for score in ("AP50", "AP") if "box_ap" in next(iter(learned.values()))]
    lines = []
    for name, of_splits in reports.items():
        for split, report in of_splits.items():
            found = [*report["ap"].values(), *(report["box_ap"][score] for score in boxes)]
            lines.append([name, split, str(report["images"]), *(f"{100 * score:.1f}" for score in found)])
    titles = ["model", "test set", "images", *next(iter(learned.values()))["ap"], *(f"box {score}" for score in boxes)]
    return markdown(titles, lines, numbers=range(2, len(titles)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, default=Path(trees.WHEEL), help="with the annotated pictures of trees")
    options = parser.parse_args(arguments)
    proof, folder = PROOFS[options.proof], options.folder
    try:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"expected an empty or a new folder, got {folder}; name another one")
        if proof is trees and not options.wheel.is_file():
            raise InputError(f"{options.wheel}: expected the wheel; pip download deepforest==2.1.0 --no-deps")
        proof.make(folder, **({"wheel": options.wheel} if proof is trees else {}))
        print(table(proof, folder, learn(proof, folder, options.proof)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
