"""Scores against the training spent on them."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from setpred.errors import InputError, plural
from setpred.files import make_folder
from setpred.metrics import AveragePrecision
from setpred.metrics.segmentation import SCORES
from setpred.visualise.style import Sheet, styled

Curve = Sequence[tuple[float, float]]  # (spent, score), ordered by what is spent

# distinct with any colour vision (Okabe and Ito without yellow, which is faint on white)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
_DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))  # one after another, when the colours repeat


@styled()
def draw_training_curves(
    path: Path, curves: Mapping[str, Sequence[Curve]], *, spent: str, score: str, subtitle: str, about: str = ""
) -> Path:
    """Draw for each name the mean over its training runs as a line, and a band from the least to the greatest.

    Args:
        path: path of the PNG.
        curves: training runs of each name, in the order of the legend.
        spent, score: labels of the axes.
        subtitle, about: text under and right of the title.
    """
    sheet = Sheet(10.4, max(5.6, 1.7 + 0.29 * max(len(curves), 12)))
    sheet.heading("Score against training", subtitle, about)
    axes = sheet.panel(0.83, 0.64, 6.08, sheet.height - 1.5)
    for number, (name, runs) in enumerate(curves.items()):
        style = {"color": _COLOURS[number % len(_COLOURS)]}
        where, scores = _common(runs)
        if not len(where):
            continue
        mean = scores.mean(0)
        if len(scores) > 1:
            axes.fill_between(where, scores.min(0), scores.max(0), alpha=0.13, linewidth=0, **style)
        style["linestyle"] = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        style["marker"] = "o" if len(where) == 1 else None
        final = f"{mean[-1]:.1f}" if abs(mean[-1]) >= 10 else f"{mean[-1]:.3g}"
        axes.plot(where, mean, linewidth=1.9, label=f"{name}  {final}", **style)
    axes.set(xlabel=spent, ylabel=score)
    axes.set_xlim(left=0)
    axes.grid()
    if axes.lines:
        title = {"title": "with the final score", "alignment": "left", "handlelength": 3.2, "fontsize": 9.5}
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), **title)
    return sheet.save(path)


def _common(runs: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the shortest run, and the scores of all runs there, interpolated linearly: `[runs, points]`."""
    arrays = [np.array(curve, dtype=float).reshape(-1, 2) for curve in runs]
    arrays = [array[np.isfinite(array).all(1)] for array in arrays]
    arrays = [array for array in arrays if len(array)]
    if not arrays:
        return np.zeros(0), np.zeros((0, 0))
    where = min(arrays, key=len)[:, 0]
    return where, np.stack([np.interp(where, *array.T) for array in arrays])


def draw_own_training(folder: Path, checkpoint: str | os.PathLike[str]) -> list[Path]:
    """Draw training.png: the validation scores of a checkpoint's run against the training time.

    AP at each threshold, or the scores of segmentations.

    Returns:
        The path written; nothing without scores in a metrics.csv in the checkpoint's folder.

    Raises:
        InputError: an invalid metrics.csv.
    """
    path = Path(checkpoint).parent / "metrics.csv"
    if not path.is_file():
        return []
    prefix, curves = f"val_{AveragePrecision.monitor}_", {}
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name.startswith(prefix)] if rows else []
        names = sorted(names, key=lambda name: float(name.removeprefix(prefix)), reverse=True)
        scores = {name: f"AP at {name.removeprefix(prefix)}" for name in names}
        if rows and not scores:
            scores = {f"val_{key}": label for key, label in SCORES.items() if f"val_{key}" in rows[0]}
        for name, label in scores.items():
            curves[label] = [[(float(row["seconds"]) / 60, 100 * float(row[name])) for row in rows if row[name]]]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is not as `setpred train` writes it ({error}); move or correct it") from error
    if not curves:
        return []
    score = "AP" if names else "score"
    labels = {"spent": "minutes of training and validation", "score": f"{score} on the validation data (%)"}
    labels |= {"subtitle": f"{plural(len(rows), 'epoch')} of training.", "about": str(checkpoint)}
    return [draw_training_curves(make_folder(folder) / "training.png", curves, **labels)]
