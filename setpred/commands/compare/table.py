"""Results of a comparison: rows, the table and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from setpred.commands.compare.budget import FIRST_STEPS
from setpred.commands.compare.runs import Candidate, Results, Run, Settings, key
from setpred.files import write_atomically
from setpred.visualise import draw_training_curves

AP = "val_ap"


def heading(score: str) -> str:
    """How a score is called in the table.

    >>> [heading(score) for score in ("val_ap", "val_ap_0.5", "val_accuracy", "val_loss")]
    ['AP', '0.5', 'accuracy', 'val. loss']
    """
    if score == "val_loss":
        return "val. loss"
    return "AP" if score == AP else score.removeprefix(f"{AP}_").removeprefix("val_")


def is_share(score: str) -> bool:
    """Whether it is an average precision, which is written in %."""
    return score == AP or score.startswith(f"{AP}_")


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def cell(values: Sequence[float | None], *, share: bool = False) -> str:
    """Mean ± standard deviation (of the sample) over seeds; no ± for one.

    >>> cell([0.25, 0.5], share=True), cell([0.25]), cell([None])
    ('37.5 ± 17.7', '0.2500', '')
    """
    there = [100 * value if share else value for value in values if value is not None]
    if not there:
        return ""
    middle = statistics.fmean(there)
    # one digit after the point of a percentage, four digits that count of anything else
    digits = 1 if share else 4 if middle == 0 else min(6, max(0, 3 - math.floor(math.log10(abs(middle)))))
    spread = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


def ranked(runs: dict[str, list[Run]], monitor: str, mode: str) -> list[str]:
    """The names of the configurations, best mean of the last point's score first, those without any last."""

    def place(name: str) -> tuple[bool, float]:
        score = mean([run["points"][-1].get(monitor) for run in whole(runs[name])])
        return score is None, 0.0 if score is None else (-score if mode == "max" else score)

    return sorted(runs, key=place)


def whole(runs: Sequence[Run]) -> list[Run]:
    """Those that came to the end of the budget."""
    return [run for run in runs if not run["failed"]]


def columns(runs: Sequence[Run], monitor: str) -> list[str]:
    """The scores, the monitored first, the loss last."""
    found = dict.fromkeys(name for run in runs for name in run["points"][-1] if name.startswith("val_"))
    return sorted(found, key=lambda name: (name == "val_loss", name != monitor))


def markdown(runs: dict[str, list[Run]], *, monitor: str, mode: str, command: str) -> str:
    """The table and what must be known to read it.

    Args:
        runs: of each configuration, by its name.
        monitor, mode: by which score they are sorted, and whether more of it ("max") or less is better.
        command: that makes it.
    """
    done = [run for name in runs for run in whole(runs[name])]
    scores = columns(done, monitor)
    titles = ["configuration", "seeds", *map(heading, scores), "train loss", "steps", "ms/step", "parameters"]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for name in ranked(runs, monitor, mode):
        ours = whole(runs[name])
        last = [run["points"][-1] for run in ours]
        first, final = cell([mean([run["first_loss"] for run in ours])]), cell([mean([p["train_loss"] for p in last])])
        cells = [
            name,
            str(len(ours)) if len(ours) == len(runs[name]) else f"{len(ours)} of {len(runs[name])}",
            *(cell([point.get(score) for point in last], share=is_share(score)) for score in scores),
            f"{first} → {final}" if ours else "failed",
            f"{statistics.fmean(run['steps'] for run in ours):,.0f}" if ours else "",
            f"{statistics.fmean(1e3 * run['seconds'] / run['steps'] for run in ours):.0f}" if ours else "",
            f"{ours[0]['parameters'] / 1e3:,.0f} k" if ours else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", footing(done, scores, command=command)]
    failures = [run for name in runs for run in runs[name] if run["failed"]]
    if failures:
        lines += ["", *(f"- {run['name']}, seed {run['seed']}, **failed**: {run['failed']}" for run in failures)]
    return "\n".join(lines) + "\n"


def footing(done: Sequence[Run], scores: Sequence[str], *, command: str) -> str:
    """Command, budget, seeds and machine in one line."""
    parts = [f"`{command}`"]
    if done:
        seeds = sorted({run["seed"] for run in done})
        machines = sorted({f"{r['processor']}, {count(r['threads'], 'thread')}, torch {r['torch']}" for r in done})
        parts += [
            f"budget {spoken(done[0]['budget'])} (training alone: no set-up, no validation)",
            ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)),
            " and ".join(machines),
        ]
        if any(map(is_share, scores)):
            parts.append("AP in %, the mean over and at each distance threshold")
        if len(seeds) > 1:
            parts.append("mean ± standard deviation over the seeds")
        parts.append(f"train loss: mean of the first {FIRST_STEPS} steps → of those since the last but one validation")
    return "; ".join(parts) + "."


def spoken(budget: str) -> str:
    """A budget for people.

    >>> spoken("600s"), spoken("90s"), spoken("2000steps")
    ('10 minutes', '90 seconds', '2,000 steps')
    """
    if budget.endswith("steps"):
        return count(int(budget.removesuffix("steps")), "step")
    seconds = float(budget.removesuffix("s"))
    return count(seconds / 60, "minute") if seconds % 60 == 0 else count(seconds, "second")


def count(number: float, noun: str) -> str:
    return f"{number:,.10g} {noun}{'' if number == 1 else 's'}"


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
