"""Train configurations under the same budget, and compare them in one table and one plot.

    python -m setpred compare configs/compare/*.yaml --budget 10m --seeds 3
    python -m setpred compare A.yaml B.yaml --budget 2000steps --out here -- --data.init_args.batch_size 32

Every configuration is trained once with each seed, in this process, one after the other, all with the first seed
first. A budget of time counts training alone, from the first step on: not the set-up, the data or the validation. The
learning rate's schedule is stretched or pressed to the budget, from the length that the configuration plans
(trainer.max_epochs), so that each training ends as it would at its own end. Time is the clock's: what else runs on the
machine takes from it, which a budget of steps is free of. At --points evenly spaced moments of the budget, the last at
its end, the model is validated on the validation data of its configuration.

What comes after `--` is handed to each configuration as to train.py: --model..., --data..., --trainer... options. A
part of your own needs a configuration that names it, and --allow.

Written to --out after every run:
  results.jsonl  a line for each run: configuration, seed, budget, options, steps, seconds, parameters, the points
                 with losses and scores, versions and machine. Runs that are there already (the same configuration,
                 seed, budget and options) are not trained again, so the same command goes on where it was
                 interrupted, and several processes with different seeds can share the folder. Failed ones are tried
                 again.
  table.md       the configurations named in the command, the best first: scores (mean ± standard deviation over all
                 seeds in the folder), training loss, steps, time a step, parameters.
  curves.png     the main score against training.
  runs/          for each run what it leaves: last.ckpt with --keep, an error.txt or repro file where it failed.

Exit status: 0; 1 if a run failed, which the table says and which does not keep the others; 2 for faults in the
command or the configurations, which are found before anything is trained; 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from setpred.commands.common import exit_code
from setpred.commands.compare.budget import Budget
from setpred.commands.compare.runs import Candidate, Results, Settings, candidate, prepare, train_one
from setpred.commands.compare.table import spoken, write_report
from setpred.errors import InputError
from setpred.files import make_folder

HANDED_ON = ("--model", "--data", "--trainer")
PART = re.compile(r"--model\.(encoder|decoder)(\.class_path)?(?==|$)")  # an option that replaces a whole part


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m setpred compare",
        usage="%(prog)s CONFIG... --budget 10m [--seeds 3] [options] [-- options of train.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="configurations of train.py")
    options.add_argument("--budget", required=True, help="of each training: 90s, 10m, 1.5h, or steps: 2000steps")
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds (default 1)")
    options.add_argument("--first-seed", type=int, default=0, metavar="S", help="seeds S, S + 1, ... (default 0)")
    options.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default: comparison)")
    options.add_argument("--points", type=int, default=8, help="validations of each training (default 8)")
    options.add_argument("--threads", type=int, help="threads of torch; its own choice unless given")
    options.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE.CLASS", help="a part of your own that may be built"
    )
    options.add_argument("--keep", action="store_true", help="keep last.ckpt of each run that is trained now")
    return options


def compare(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (`sys.argv` unless given).

    Returns:
        How many runs failed.

    Raises:
        InputError: faults in the command or a configuration, before anything is trained.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:split])
    check(options, further := arguments[split + 1 :])
    settings = Settings(
        Budget.parse(options.budget), tuple(further), options.out, options.points, options.keep, tuple(options.allow)
    )
    results = Results(make_folder(options.out) / "results.jsonl")
    if options.threads:
        torch.set_num_threads(options.threads)
    candidates = [candidate(path, settings) for path in options.configs]
    check_comparable(candidates)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = results.read()
    lacking = [
        (which, seed)
        for seed in seeds
        for which in candidates
        if runs.get(which.key(seed, settings), {"failed": True})["failed"]
    ]
    print(f"{len(lacking)} trainings of {spoken(str(settings.budget))}, {len(candidates) * len(seeds)} asked for")
    for which in dict.fromkeys(which for which, _ in lacking):
        prepare(which, settings)
    command = command_line(arguments, options.configs)
    failed = 0
    for number, (which, seed) in enumerate(lacking, 1):
        print(f"training {number} of {len(lacking)}: {which.name}, seed {seed}", flush=True)
        run = train_one(which, seed, settings)
        results.add(run)
        if run["failed"]:
            failed += 1
            print(f"  {which.name}, seed {seed}, failed: {run['failed']}", flush=True)
        write_report(results, candidates, settings, command=command)
        gc.collect()  # a model and its graph hold each other; the next needs the memory
    print("\n" + write_report(results, candidates, settings, command=command))
    print(f"the table, curves.png and results.jsonl are in {options.out}")
    return failed


def check(options: argparse.Namespace, further: Sequence[str]) -> None:
    """What can be said before a configuration is built."""
    for name in ("seeds", "points", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    if options.first_seed < 0:
        raise InputError(f"--first-seed: expected at least 0, got {options.first_seed}")
    for option in further:
        if option.startswith("--") and not option.startswith(HANDED_ON):
            raise InputError(f"after --: expected {', '.join(HANDED_ON)} options for the configurations, got {option}")
        if len(options.configs) > 1 and (part := PART.match(option)):
            raise InputError(
                f"after --: {part[0]} would give every configuration the same {part[1]} under its old name; "
                f"put the {part[1]} into a new configuration"
            )
    seen: dict[str, Path] = {}
    for path in options.configs:
        if not path.is_file():
            raise InputError(f"{path}: expected a configuration, got no file of that name")
        if path.stem in seen:
            raise InputError(
                f"{seen[path.stem]} and {path} have the same name, by which the table would call both; rename one, or "
                "compare them one at a time"
            )
        seen[path.stem] = path


def check_comparable(candidates: Sequence[Candidate]) -> None:
    """One table is sorted by one score."""
    first = candidates[0]
    for other in candidates[1:]:
        if (other.monitor, other.mode) != (first.monitor, first.mode):
            raise InputError(
                f"{first.path} is judged by {first.monitor} ({first.mode}) and {other.path} by {other.monitor} "
                f"({other.mode}), which have no place in one table; compare them apart"
            )


def command_line(arguments: Sequence[str], configs: Sequence[Path]) -> str:
    """The command as it would be typed: all configurations of a folder as FOLDER/*.yaml."""
    words = ["python -m setpred compare"]
    for argument in arguments:
        word, folder = shlex.quote(argument), Path(argument).parent
        if Path(argument) in configs and len(every := set(folder.glob("*.yaml"))) > 1 and every <= set(configs):
            word = f"{shlex.quote(str(folder))}/*.yaml"
        if word != words[-1] or not word.endswith("/*.yaml"):
            words.append(word)
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred compare`; return the exit status, 1 where a run failed."""
    interrupted = "interrupted; what was finished is kept, the same command goes on from there"
    return exit_code(lambda: min(compare(arguments), 1), interrupted=interrupted)
