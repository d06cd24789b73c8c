"""The score of one training against its time."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from setpred.errors import InputError
from setpred.files import make_folder
from setpred.metrics import AveragePrecision
from setpred.visualise.style import plural
from setpred.visualise.training_curves import draw_training_curves


def draw_own_training(folder: Path, checkpoint: str | os.PathLike[str]) -> list[Path]:
    """Writes training.png, the validation AP at each threshold against the time of training.

    Out of the metrics.csv that train.py leaves beside a checkpoint; nothing where there is none.

    Raises:
        InputError: a metrics.csv that is none of train.py.
    """
    path = Path(checkpoint).parent / "metrics.csv"
    if not path.is_file():
        return []
    prefix, curves = f"val_{AveragePrecision.monitor}_", {}
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in reversed([name for name in rows[0] if name.startswith(prefix)] if rows else []):
            spent = [(float(row["seconds"]) / 60, 100 * float(row[name])) for row in rows if row[name]]
            curves[f"AP at {name.removeprefix(prefix)}"] = [spent]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is not as train.py writes it ({error}); move it away, or mend it") from error
    if not curves:
        return []
    return [
        draw_training_curves(
            make_folder(folder) / "training.png",
            curves,
            spent="minutes of training and validation",
            score="AP on the validation data (%)",
            subtitle=f"{plural(len(rows), 'epoch')} of training.",
            about=str(checkpoint),
        )
    ]
