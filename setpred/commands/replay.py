"""Repeats the step that a training failed at: `python -m setpred replay repro-step-N.pt`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from setpred.commands.common import choose_device, exit_code
from setpred.errors import InputError, reason
from setpred.nonfinite.locate import diagnose
from setpred.nonfinite.repro import read


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m setpred replay",
        description="Repeat a step whose numbers broke, from the file that the training wrote: every stage with its "
        "norms, down to the first number that is not finite. Exit status 0: it broke as in the training; 1: it did "
        "not; 2: the file cannot be repeated.",
    )
    options.add_argument("file", help="a repro-step-N.pt out of the run's folder")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    options.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE.CLASS", help="a part of your own that may be built"
    )
    return options


def replay(arguments: Sequence[str] | None = None) -> bool:
    """Runs the command with these arguments (`sys.argv` unless given); returns whether the step broke as it did.

    Raises:
        InputError: a file that is missing, damaged, of another kind or not allowed; a step that cannot be repeated.
    """
    options = parser().parse_args(arguments)
    repro = read(options.file, allow=options.allow, device=choose_device(options.device))
    kind = "validation" if repro.step.seed is None else "training"
    print(f"{options.file}: {kind}, seed {repro.step.seed}, {repro.precision}")
    try:
        with repro.autocast():
            stages = diagnose(repro.step)
    except Exception as error:  # the batch of an untrusted file may fail anywhere
        raise InputError(f"{options.file}: the step cannot be repeated: {reason(error)}") from error
    for stage in stages:
        print(f"  {stage}, norm {stage.norm:.3g}")
    fault = stages[-1]
    same = not fault.finite and fault == repro.fault
    if same:
        print(f"reproduced: {fault}. What to do: {fault.advice}")
    else:
        now = "all numbers are finite" if fault.finite else fault
        print(f"not reproduced: in the training {repro.fault}; here {now}")
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred replay`; return the exit status, 0 where the step broke as it did."""
    return exit_code(lambda: 0 if replay(arguments) else 1, interrupted="interrupted")
