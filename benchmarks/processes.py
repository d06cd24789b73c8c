"""Two processes with half a batch each against one with the full batch, on the quickstart's training.

    python -m benchmarks.processes            # 2 turns of 3 epochs of 40 steps
    python -m benchmarks.processes --quick    # 1 turn of 2 epochs of 4 steps

One process uses all cores, each of two processes half of them. The processor does the same work, so the difference is
the cost of gathering gradients (gloo), of the batches and of starting. Times of epochs come from metrics.csv, without
the first epoch; the ratio is one process / two processes, larger is better.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from setpred.workers import available_cores

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32  # the quickstart's


def epoch_seconds(folder: Path, processes: int, *, epochs: int, steps: int) -> float:
    """Seconds of a training epoch with this number of processes."""
    options = {
        "config": ROOT / "configs" / "quickstart.yaml",
        "runs": folder / "runs",
        "name": f"{processes}",
        "data.init_args.folder": folder / "data",
        "data.init_args.train_images": steps * BATCH,
        "data.init_args.val_images": 16,
        "data.init_args.batch_size": BATCH // processes,
        "trainer.max_epochs": epochs,
        "trainer.check_val_every_n_epoch": 1000,
        "trainer.devices": processes,
        "trainer.logger": "false",
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, available_cores() // processes))}
    command = [sys.executable, str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    with (folder / "runs" / str(processes) / "metrics.csv").open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    quick = parser.parse_args(arguments).quick
    turns, epochs, steps = (1, 2, 4) if quick else (2, 3, 40)
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for processes, seconds in found.items():
                seconds.append(epoch_seconds(Path(folder), processes, epochs=epochs, steps=steps))
    for processes, seconds in found.items():
        each = ", ".join(f"{1000 * value / steps:.0f}" for value in seconds)
        print(f"{processes} x batch {BATCH // processes}: {each} ms a step")
    ratio = statistics.median(one / two for one, two in zip(*found.values(), strict=True))
    print(f"ratio one process / two: {ratio:.2f} on {available_cores()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
