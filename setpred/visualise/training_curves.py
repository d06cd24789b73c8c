"""A score against the training spent on it, of many trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from setpred.visualise.style import heading, new_figure, save_png, styled

Curve = Sequence[tuple[float, float]]  # (spent, score), rising in what is spent

# told from each other with any colour vision (Okabe and Ito's, without yellow, which is faint on white); a dash each
# time round
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
_DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))


@styled()
def draw_training_curves(
    path: Path,
    curves: Mapping[str, Sequence[Curve]],
    *,
    spent: str,
    score: str,
    subtitle: str,
    about: str = "",
) -> Path:
    """For each name the mean over its trainings as a line, with a band from the least to the greatest.

    Args:
        path: of the PNG.
        curves: the trainings of each name, in the order of the legend; the best first reads well.
        spent, score: what the axes show.
        subtitle, about: see `heading`.
    """
    rows = max(len(curves), 12)
    figure = new_figure(10.4, max(5.6, 1.7 + 0.29 * rows))
    heading(figure, "Score against training", subtitle, about)
    axes = figure.add_axes((0.08, 0.115, 0.585, 0.73))
    for number, (name, trainings) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        where, scores = _together(trainings)
        if not len(where):
            continue
        middle = scores.mean(0)
        marker = "o" if len(where) == 1 else None
        label = f"{name}  {_short(middle[-1])}"
        axes.plot(where, middle, color=colour, linestyle=dashes, marker=marker, linewidth=1.9, label=label)
        if len(scores) > 1:
            axes.fill_between(where, scores.min(0), scores.max(0), color=colour, alpha=0.13, linewidth=0)
    axes.set(xlabel=spent, ylabel=score)
    axes.set_xlim(left=0)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    if axes.lines:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.02), handlelength=3.2, fontsize=9.5,
            title="with the score at the end", alignment="left",
        )  # fmt: skip
    return save_png(figure, path)


def _together(trainings: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Where the shortest training was scored, and the scores of all there `[trainings, points]`, between by lines."""
    arrays = [np.array(curve, dtype=float).reshape(-1, 2) for curve in trainings]
    arrays = [array[np.isfinite(array).all(1)] for array in arrays]
    arrays = [array for array in arrays if len(array)]
    if not arrays:
        return np.zeros(0), np.zeros((0, 0))
    where = min(arrays, key=len)[:, 0]
    return where, np.stack([np.interp(where, *array.T) for array in arrays])


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
