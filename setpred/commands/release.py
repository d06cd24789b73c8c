"""Release a checkpoint as a single file: `python -m setpred release`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from setpred.checkpoint.load import load_checkpoint
from setpred.checkpoint.release import CONFIG, MEGABYTES, export
from setpred.checkpoint.torch_export import export_program
from setpred.commands.common import Parser, exit_code
from setpred.commands.outputs import check_outputs
from setpred.errors import InputError
from setpred.files import write_atomically

PROGRAM_SUFFIX = ".pt2"


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "release",
        "Write a checkpoint as a small file to publish: weights in half precision as safetensors, with the "
        "configuration of its training. Every command reads it like the checkpoint.",
    )
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`")
    options.add_argument("--out", type=Path, metavar="NAME.safetensors", help="release file to write")
    options.add_argument(
        "--export",
        type=Path,
        metavar="NAME.pt2",
        help="also or only write the model as a torch.export program, which runs without setpred: images [batch, 3, "
        "size, size], uint8 or float32 in [0, 1], to elements",
    )
    options.add_argument(
        "--megabytes", type=float, default=MEGABYTES, help="largest file to write (default: %(default)g)"
    )
    options.add_shared("--allow")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred release`; return the exit status."""
    return exit_code(lambda: release(parser().parse_args(arguments)), interrupted="interrupted")


def release(options: argparse.Namespace) -> None:
    """Write what the options ask for, and print the files; see `export` and `export_program`."""
    if options.out is None and options.export is None:
        raise InputError("nothing to write; give --out NAME.safetensors or --export NAME.pt2")
    check_outputs(
        {"--out": options.out, "--export": options.export},
        inputs=[options.checkpoint, Path(options.checkpoint).with_name(CONFIG)],
    )
    if options.export is not None and options.export.suffix != PROGRAM_SUFFIX:
        raise InputError(f"--export {options.export}: expected a name that ends in {PROGRAM_SUFFIX}")
    written = []
    if options.export is not None:  # first, since it may fail
        loaded = load_checkpoint(options.checkpoint, allow=options.allow)
        loaded.require_schema(options.checkpoint)
        write_atomically(options.export, export_program(loaded))
        written.append(options.export)
    if options.out is not None:
        written += export(options.checkpoint, options.out, megabytes=options.megabytes, allow=options.allow)
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    if options.out in written and options.out.with_suffix(".yaml") not in written:
        print(f"no {CONFIG} in the folder of {options.checkpoint}: released without the configuration of its training")
