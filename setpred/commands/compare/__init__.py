"""Train configurations under the same budget and rank them in one table.

    setpred compare configs/compare/*.yaml --budget 10m --seeds 3
    setpred compare A.yaml B.yaml --budget 2000steps -- --data.init_args.batch_size 32
    setpred compare configs/compare/*.yaml --budget 5m -- --data train.h5 --val val.h5

Trains each configuration with each seed, one after the other. A budget of time counts training alone, without set-up
and validation; what else runs on the machine shortens it, unlike a budget of steps. The learning rate schedule is
stretched or compressed from the planned length (trainer.max_epochs) to the budget. Options after `--` go to every
configuration, as to `setpred train`.

Writes into --out after each run: results.jsonl (a line per run), table.md (best configuration first, mean ± standard
deviation over seeds), curves.png, runs/ (with --keep last.ckpt; error.txt or a repro file of a failure). The same
command resumes an interrupted comparison and repeats failed runs. Processes with different seeds can share --out.

Exit status: 0; 1 if a run failed; 2 for an error found before any training; 130 for Ctrl-C.
"""

import argparse
import gc
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from setpred.checkpoint.untrusted import read_yaml
from setpred.commands.common import Parser, at_least, exit_code
from setpred.commands.compare.results import add_result, identity, read_results, write_report
from setpred.commands.compare.training import build_configuration, naming, train_one
from setpred.commands.outputs import check_outputs
from setpred.commands.train import data_digests, prepare_data
from setpred.errors import InputError
from setpred.files import make_folder
from setpred.training.budget import Budget

PREFIXES = ("--model", "--data", "--val", "--trainer")  # of options after --
PART = re.compile(r"--model\.(encoder|decoder)(\.class_path)?(?==|$)")  # an option that replaces a part


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "compare",
        __doc__,
        usage="%(prog)s CONFIG... --budget 10m [--seeds 3] [options] [-- options of `setpred train`]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="configurations of `setpred train`")
    options.add_argument("--budget", required=True, help="of each training: 90s, 10m, 1.5h, or steps: 2000steps")
    options.add_argument("--seeds", type=at_least(1), default=1, metavar="N", help="number of seeds (default 1)")
    options.add_argument("--first-seed", type=at_least(0), default=0, metavar="S", help="first seed (default 0)")
    options.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default: comparison)")
    options.add_argument("--points", type=at_least(1), default=8, help="evenly spaced validations of a run (default 8)")
    options.add_argument("--threads", type=at_least(1), help="threads of torch (default: its own choice)")
    options.add_shared("--allow")
    options.add_argument("--keep", action="store_true", help="keep last.ckpt of each new run")
    return options


def compare(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred compare` with these arguments, `sys.argv` by default; return how many runs failed.

    Raises:
        InputError: an error in the command or a configuration, before anything is trained.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:split])
    options.train, options.budget = arguments[split + 1 :], Budget.parse(options.budget)
    check_options(options)
    check_outputs({}, {"--out": options.out})
    results = make_folder(options.out) / "results.jsonl"
    if options.threads:
        torch.set_num_threads(options.threads)
    built = {path: build_configuration(path, options) for path in options.configs}
    scores = {(cli.model.monitor, cli.model.mode): path for path, cli in built.items()}
    if len(scores) > 1:
        found = " and ".join(f"{monitor} ({mode}) of {path}" for (monitor, mode), path in scores.items())
        raise InputError(f"expected one score to rank by, got {found}; compare them apart")
    score = dict(zip(("monitor", "mode"), *scores, strict=True))
    digests = {path: digest(path, data_digests(cli.datamodule)) for path, cli in built.items()}
    command = command_line(arguments, options.configs)

    def described(path: Path, seed: int) -> dict:
        run = {"config": str(path), "name": path.stem, "digest": digests[path], "seed": seed}
        return run | {"budget": str(options.budget), "options": options.train} | score

    def report() -> str:
        """Write the table and the plot of all seeds in the file; return the table."""
        found = sorted(read_results(results).values(), key=lambda run: run["seed"])
        own = {path: [r for r in found if identity(r) == identity(described(path, r["seed"]))] for path in built}
        runs = {path.stem: own[path] for path in built if own[path]}
        return write_report(options.out, runs, options.budget, command=command, **score)

    runs, seeds = read_results(results), range(options.first_seed, options.first_seed + options.seeds)
    wanted = [(path, seed) for seed in seeds for path in options.configs]
    lacking = [run for run in wanted if runs.get(identity(described(*run)), {"failed": True})["failed"]]
    print(f"{len(lacking)} trainings of {options.budget.words}, {len(wanted)} asked for")
    for path in dict.fromkeys(path for path, _ in lacking):
        with naming(path):
            prepare_data(built[path])
    built = dict.fromkeys(built)  # frees the models
    failed = 0
    for number, (path, seed) in enumerate(lacking, 1):
        print(f"training {number} of {len(lacking)}: {path.stem}, seed {seed}", flush=True)
        run = described(path, seed) | train_one(path, seed, options)
        add_result(results, run)
        if run["failed"]:
            failed += 1
            print(f"  {path.stem}, seed {seed}, failed: {run['failed']}", flush=True)
        report()
        gc.collect()  # model and graph refer to each other; the next training needs the memory
    print(f"\n{report()}\nthe table, curves.png and results.jsonl are in {options.out}")
    return failed


def check_options(options: argparse.Namespace) -> None:
    """Check the names of the configurations and the options after `--`, before anything is built."""
    for option in options.train:
        if option.startswith("--") and not option.startswith(PREFIXES):
            raise InputError(f"after --: expected {', '.join(PREFIXES)} options for the configurations, got {option}")
        if len(options.configs) > 1 and (part := PART.match(option)):
            raise InputError(
                f"after --: {part[0]} would give every configuration the same {part[1]} under its old name; "
                f"put the {part[1]} into a new configuration"
            )
    for first, second in itertools.combinations(options.configs, 2):
        if first.stem == second.stem:
            raise InputError(f"{first} and {second} have the same name in the table; rename one of them")


def digest(path: Path, files: dict[str, str] | None = None) -> str:
    """Hash the content of a configuration, without its comments, and of its prepared files, which may be replaced."""
    content = json.dumps(read_yaml(path), sort_keys=True, default=str)
    return hashlib.sha256((content + (json.dumps(files) if files else "")).encode()).hexdigest()[:16]


def command_line(arguments: Sequence[str], configs: Sequence[Path]) -> str:
    """Return the command as typed, with all configurations of one folder as FOLDER/*.yaml."""
    words, folder = list(map(shlex.quote, arguments)), configs[0].parent
    if len(configs) > 1 and sorted(configs) == sorted(folder.glob("*.yaml")):
        words = [word for word, typed in zip(words, arguments, strict=True) if Path(typed) not in configs]
        words = [f"{shlex.quote(str(folder))}/*.yaml", *words]
    return " ".join(["setpred compare", *words])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred compare`; return the exit status, 1 if a run failed."""
    interrupted = "interrupted; finished runs are kept, the same command continues"
    return exit_code(lambda: min(compare(arguments), 1), interrupted=interrupted)
