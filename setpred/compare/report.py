"""Table and plot of a comparison, from the file of results."""

from __future__ import annotations

from collections.abc import Sequence

from setpred.compare.results import Results, Run, key
from setpred.compare.runs import Candidate, Settings
from setpred.compare.table import count, heading, is_share, markdown, ranked, spoken, whole
from setpred.files import write_atomically
from setpred.visualise import draw_training_curves

SCALES = {"hours": 3600, "minutes": 60, "seconds": 1}  # of the plot, the largest that the budget has three of


def write_report(results: Results, candidates: Sequence[Candidate], settings: Settings, *, command: str) -> str:
    """Writes table.md and curves.png of the configurations' runs of all seeds in the file; returns the table."""
    monitor, mode = candidates[0].monitor, candidates[0].mode
    found = results.read().values()
    runs = {which.name: [run for run in found if is_of(run, which, settings)] for which in candidates}
    runs = {name: sorted(ours, key=lambda run: run["seed"]) for name, ours in runs.items() if ours}
    table = markdown(runs, monitor=monitor, mode=mode, command=command)
    write_atomically(settings.out / "table.md", table)
    budget = settings.budget
    if budget.in_steps:
        spent, unit, scale = "step", "steps of training", 1
    else:
        spent = "seconds"
        unit, scale = next(((u, s) for u, s in SCALES.items() if budget.amount >= 3 * s), ("seconds", 1))
        unit += " of training"
    factor, sign = (100, " (%)") if is_share(monitor) else (1, "")
    curves = {
        name: [
            [(p[spent] / scale, factor * p[monitor]) for p in run["points"] if p[monitor] is not None]
            for run in whole(runs[name])
        ]
        for name in ranked(runs, monitor, mode)
    }
    seeds = max((len(ours) for ours in curves.values()), default=0)
    draw_training_curves(
        settings.out / "curves.png",
        {name: ours for name, ours in curves.items() if ours},
        spent=unit,
        score=f"{heading(monitor)} on the validation data{sign}",
        subtitle=f"Budget of {spoken(str(budget))} each"
        + (f"; line: mean of {count(seeds, 'seed')}, band: least to greatest." if seeds > 1 else "; one seed."),
    )
    return table


def is_of(run: Run, which: Candidate, settings: Settings) -> bool:
    return key(run) == which.key(run["seed"], settings)
