"""Repeats the step that a training failed at: `python -m setpred replay repro-step-N.pt`."""

from collections.abc import Sequence

from setpred.commands.common import Parser, choose_device, exit_code
from setpred.errors import InputError, reason
from setpred.nonfinite.locate import diagnose
from setpred.nonfinite.repro import read


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "replay",
        "Repeat a training step with non-finite numbers, from the file that the training wrote, and print the norms of "
        "every stage up to the first non-finite number. Exit status 0: it failed as in the training; 1: it did not; 2: "
        "the file cannot be replayed.",
    )
    options.add_argument("file", help="a repro-step-N.pt of the run's folder")
    options.add_shared("--device", "--allow")
    return options


def replay(arguments: Sequence[str] | None = None) -> bool:
    """Run the command with these arguments, `sys.argv` by default; return whether the step failed in the same way.

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
    """Run `setpred replay`; return the exit status, 0 if the step failed in the same way."""
    return exit_code(lambda: 0 if replay(arguments) else 1, interrupted="interrupted")
