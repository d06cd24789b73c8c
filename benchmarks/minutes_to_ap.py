"""Minutes of training until AP at distance 0.5 first reaches 80 %, read from the quickstart's training files.

    python -m benchmarks.minutes_to_ap          # the quickstart's run, from the first existing file below
    python -m benchmarks.minutes_to_ap FILE     # another run: results.jsonl or metrics.csv

This trains nothing. The run to read is

    python -m setpred compare configs/quickstart.yaml --budget 15000steps --points 60 --threads 2 \
        --out comparison/quickstart

which validates 60 times; its results.jsonl has the seconds of training alone, threads and processor. The fallback is
checkpoints/quickstart/metrics.csv of `make demo`, with a row per epoch, whose seconds include set-up and validation: an
upper bound.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown as table
from benchmarks.tables import number
from setpred.commands.compare.results import read_results
from setpred.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FILES = ("comparison/quickstart/results.jsonl", "checkpoints/quickstart/metrics.csv")
SCORE, BAR = "val_ap_0.5", 0.80
TITLES = ("run", "minutes to AP 80 % at 0.5", "highest AP, %", "minutes in all", "")


def runs_of(path: Path) -> list[dict[str, Any]]:
    """Name, note and points (seconds, AP) of each run in a file.

    Raises:
        InputError: a missing file, or one without such scores.
    """
    if not path.is_file():
        raise InputError(f"expected a results.jsonl or a metrics.csv, got no file {path}; train first")
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found = [(path.parent.name, "upper bound: training, validation and set-up", list(csv.DictReader(file)))]
        else:
            found = [
                (f"{run['name']}, seed {run['seed']}", f"training alone; {place(run)}", run["points"])
                for run in read_results(path).values()
            ]
        runs = [
            {"name": name, "note": note, "points": [(float(p["seconds"]), float(p[SCORE])) for p in points if p[SCORE]]}
            for name, note, points in found
        ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"expected points with seconds and {SCORE} in {path}, got {error!r}; train again") from error
    if not any(run["points"] for run in runs):
        raise InputError(f"expected points with {SCORE} in {path}, got none; train longer")
    return [run for run in runs if run["points"]]


def place(run: dict[str, Any]) -> str:
    return f"{run['threads']} thread{'' if run['threads'] == 1 else 's'}, {run['processor']}, torch {run['torch']}"


def reached(run: dict[str, Any]) -> dict[str, Any]:
    """Time at which the score first reaches the bar (None: never), the best score, and the length of the run."""
    minutes = [seconds / 60 for seconds, score in run["points"] if score >= BAR]
    best, length = max(score for _, score in run["points"]), run["points"][-1][0] / 60
    note = {"name": run["name"], "note": run["note"]}
    return note | {"minutes": minutes[0] if minutes else None, "best": best, "length": length}


def measure(quick: bool) -> list[dict[str, Any]]:
    """The quickstart's runs; empty without a training."""
    there = [path for path in (ROOT / name for name in FILES) if path.is_file()]
    return [reached(run) for run in runs_of(there[0])] if there else []


def markdown(found: list[dict[str, Any]]) -> str:
    command = "`python -m benchmarks.minutes_to_ap`"
    if not found:
        return f"No training of the quickstart to read; `make demo` makes one. {command}"
    lines = [
        [run["name"], number(run["minutes"]) or "never", f"{100 * run['best']:.1f}", number(run["length"]), run["note"]]
        for run in found
    ]
    return table(TITLES, lines, numbers=range(1, 4)) + f"\n{command}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="results.jsonl or metrics.csv (default: the quickstart's)")
    path = parser.parse_args(arguments).file
    try:
        print(markdown(measure(quick=False) if path is None else [reached(run) for run in runs_of(path)]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
