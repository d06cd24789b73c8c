"""Results of a comparison: the file of runs, the table and the plot."""

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setpred.errors import InputError, plural
from setpred.files import write_atomically, writing
from setpred.training.budget import FIRST_STEPS, Budget
from setpred.visualise import draw_training_curves

Run = dict[str, Any]
AP = "val_ap"


def identity(run: Mapping[str, Any]) -> str:
    """Return what tells runs apart: the configuration's digest, seed, budget and options."""
    return json.dumps([run[name] for name in ("digest", "seed", "budget", "options")])


def read_results(path: Path) -> dict[str, Run]:
    """Read the complete lines of a results.jsonl, by identity; of repeated runs the last counts.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected the results of a comparison, got what cannot be read") from error
    runs: dict[str, Run] = {}
    for number, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            runs[identity(run)] = run
        except (ValueError, KeyError, TypeError):  # a process was killed while writing
            print(f"{path}: skipped line {number}, which is not a complete result", flush=True)
    return runs


def add_result(path: Path, run: Run) -> None:
    """Append a run in one write, as other processes may at the same time; raise `InputError` if that fails."""
    with writing(path), path.open("ab+", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        cut_off = file.read(1) not in (b"", b"\n")  # the last line, by a kill
        file.write((("\n" if cut_off else "") + json.dumps(run) + "\n").encode())


def is_ap(score: str) -> bool:
    """Return whether a score is an average precision, which is shown in %.

    >>> [is_ap(score) for score in ("val_ap", "val_ap_0.5", "val_medoid_ap_inf", "val_box_ap50", "val_energy")]
    [True, True, True, True, False]
    """
    return re.fullmatch(r"val_([a-z]+_)?ap\d*(_.+)?", score) is not None


def heading(score: str) -> str:
    """Return the name of a score in the table.

    >>> [heading(score) for score in ("val_ap", "val_ap_0.5", "val_accuracy", "val_loss")]
    ['AP', '0.5', 'accuracy', 'val. loss']
    """
    names = {AP: "AP", "val_loss": "val. loss"}
    return names.get(score, score.removeprefix(f"{AP}_").removeprefix("val_"))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cell(values: Sequence[float | None], *, percent: bool = False) -> str:
    """Format mean ± sample standard deviation of the known values, without ± for one.

    >>> cell([0.25, 0.5], percent=True), cell([0.25]), cell([None])
    ('37.5 ± 17.7', '0.2500', '')
    """
    known = [100 * value if percent else value for value in values if value is not None]
    if not known:
        return ""
    middle = mean(known)
    # one decimal of a percentage, four significant digits of anything else
    digits = 1 if percent else 4 if middle == 0 else min(6, max(0, 3 - math.floor(math.log10(abs(middle)))))
    return f"{middle:.{digits}f}" + (f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else "")


def finished(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that used up their budget."""
    return [run for run in runs if not run["failed"]]


def ranked(runs: dict[str, list[Run]], monitor: str, mode: str) -> dict[str, list[Run]]:
    """Sort configurations by the mean of their last monitored score, best first; those without one come last."""

    def rank(name: str) -> float:
        score = mean([run["points"][-1].get(monitor) for run in finished(runs[name])])
        return math.inf if score is None else -score if mode == "max" else score

    return {name: runs[name] for name in sorted(runs, key=rank)}


def markdown(runs: dict[str, list[Run]], *, monitor: str, command: str) -> str:
    """Return the table in Markdown, and a line that explains it.

    Args:
        runs: runs of each configuration, by name, in the order of the table.
        monitor: score of the first column.
        command: command line that makes the table.
    """
    every = [run for own in runs.values() for run in own]
    done, failures = finished(every), [run for run in every if run["failed"]]
    found = dict.fromkeys(name for run in done for name in run["points"][-1] if name.startswith("val_"))
    scores = sorted(found, key=lambda name: (name == "val_loss", name != monitor))
    titles = ["configuration", "seeds", *map(heading, scores), "train loss", "steps", "ms/step", "parameters"]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for name, own in runs.items():
        ended = finished(own)
        last, count = [run["points"][-1] for run in ended], len(ended)
        row = [name, str(count) if count == len(own) else f"{count} of {len(own)}"]
        row += [cell([point.get(score) for point in last], percent=is_ap(score)) for score in scores]
        if ended:
            losses = [run["first_loss"] for run in ended], [point["train_loss"] for point in last]
            row.append(" → ".join(cell([mean(values)]) for values in losses))
            row.append(f"{mean([run['steps'] for run in ended]):,.0f}")
            row.append(f"{mean([1e3 * run['seconds'] / run['steps'] for run in ended]):.0f}")
            row.append(f"{ended[0]['parameters'] / 1e3:,.0f} k")
        rows.append(row if ended else [*row, "failed", "", "", ""])
    notes = [f"`{command}`"]
    if done:
        seeds = sorted({run["seed"] for run in done})
        machines = sorted({(run["processor"], run["threads"], run["torch"]) for run in done})
        notes += [
            f"budget {Budget.parse(done[0]['budget']).words} (training alone: no set-up, no validation)",
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
            " and ".join(f"{cpu}, {plural(threads, 'thread')}, torch {torch}" for cpu, threads, torch in machines),
            "AP in %, the mean over and at each distance threshold" * any(map(is_ap, scores)),
            "mean ± standard deviation over the seeds" * (len(seeds) > 1),
            f"train loss: mean of the first {FIRST_STEPS} steps → of those since the last but one validation",
        ]
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows), "; ".join(filter(None, notes)) + "."]
    parts += ["\n".join(f"- {run['name']}, seed {run['seed']}, **failed**: {run['failed']}" for run in failures)]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_report(path: Path, runs: dict[str, list[Run]], budget: Budget, *, monitor: str, mode: str, command: str):
    """Write table.md and curves.png, the best configuration first, into the folder `path`; return the table."""
    runs = ranked(runs, monitor, mode)
    table = markdown(runs, monitor=monitor, command=command)
    write_atomically(path / "table.md", table)
    minutes = not budget.in_steps and budget.amount >= 180
    x, scale = "step" if budget.in_steps else "seconds", 60 if minutes else 1
    factor, sign = (100, " (%)") if is_ap(monitor) else (1, "")
    curves = {
        name: [[(p[x] / scale, factor * p[monitor]) for p in run["points"] if p[monitor] is not None] for run in own]
        for name, every in runs.items()
        if (own := finished(every))
    }
    seeds = max(map(len, curves.values()), default=0)
    over = f"; line: mean of {seeds} seeds, band: least to greatest." if seeds > 1 else "; one seed."
    unit = "steps" if budget.in_steps else "minutes" if minutes else "seconds"
    labels = {"spent": f"{unit} of training", "score": f"{heading(monitor)} on the validation data{sign}"}
    draw_training_curves(path / "curves.png", curves, **labels, subtitle=f"Budget of {budget.words} each{over}")
    return table
