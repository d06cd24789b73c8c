"""`python -m setpred data`: prepare a CLEVR folder, render built-in scenes, verify and describe the files."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from setpred.commands.common import exit_code
from setpred.data.workers import available_cores
from setpred.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred data`; return the exit status."""
    stop_as_on_ctrl_c()
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options), interrupted="interrupted; the same command goes on from there")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m setpred data",
        description="Makes, checks and describes the HDF5 files of images and object sets that setpred learns from.",
        epilog="Files appear under their name only when complete; an interrupted command, run again, goes on.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare",
        help="decode and resize the images of a CLEVR folder once",
        description="Decodes and resizes the images of a folder in the CLEVR_v1.0 layout (data/README.md says how to "
        "get it) and stores them with their objects in one file.",
    )
    prepare.add_argument("root", metavar="ROOT", type=Path, help="the folder, with images/ and scenes/ in it")
    prepare.add_argument("--split", default="val", help="train or val; CLEVR's test split has no scenes (default: val)")
    prepare.add_argument("--images", type=int, metavar="N", help="only the first N images (default: all)")
    _add_output(prepare)
    prepare.set_defaults(run=_prepare)

    render = commands.add_parser(
        "render",
        help="render random scenes, no download needed",
        description="Renders random scenes by CLEVR's rules and stores them with their objects in one file. The same "
        "seed gives the same images, whatever the number of workers.",
    )
    _add_scenes(render)
    _add_output(render)
    render.set_defaults(run=_render)

    folder = commands.add_parser(
        "render-folder",
        help="render random scenes into a folder of pictures and JSON as CLEVR's",
        description="Renders the scenes of `render` into a folder in the CLEVR_v1.0 layout, for other programs and for "
        "`prepare`: images/SPLIT/*.png, scenes/CLEVR_SPLIT_scenes.json and, beyond CLEVR, cameras.jsonl.",
    )
    _add_scenes(folder)
    folder.add_argument("--split", default="val", help="its name; give each split a seed of its own (default: val)")
    folder.add_argument("--width", type=int, default=480, metavar="W", help="of the pictures (default: 480)")
    folder.add_argument("--height", type=int, default=320, metavar="H", help="of the pictures (default: 320)")
    folder.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder; splits can share it")
    _add_workers(folder)
    folder.add_argument("--force", action="store_true", help="replace the split if it exists")
    folder.set_defaults(run=_render_folder)

    compare = commands.add_parser(
        "compare",
        help="hold the renderer against pictures made elsewhere",
        description="Renders every scene of a CLEVR folder that has a cameras.jsonl (as `render-folder` writes it) and "
        "prints how far the pictures are from those in the folder: root mean squared difference over all pixels and "
        "over objects, mean difference, agreement of the objects' masks, error of projected centres.",
    )
    compare.add_argument("root", metavar="ROOT", type=Path, help="the folder, with images/, scenes/ and cameras.jsonl")
    compare.add_argument("--split", default="val", help="which (default: val)")
    compare.add_argument("--first", type=int, default=0, metavar="N", help="leave out the images before this one")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    compare.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw theirs, ours and 4 times the difference")
    compare.set_defaults(run=_compare)

    for name, run, text in (
        ("verify", _verify, "read a whole file and compare its checksum"),
        ("info", _info, "say what is in a file"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("file", metavar="FILE.h5", type=Path)
        command.set_defaults(run=run)
    return parser


def _add_scenes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=int, required=True, metavar="N", help="how many")
    command.add_argument(
        "--objects", type=int, nargs=2, default=(3, 10), metavar=("LEAST", "MOST"), help="in a scene (default: 3 10)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="K", help="which random scenes (default: 0)")
    command.add_argument(
        "--condition",
        default="clevr",
        help="clevr: every shape has every colour; cogent-a, cogent-b: cubes and cylinders have four each, as in "
        "CLEVR-CoGenT (default: clevr)",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image-size", type=int, default=128, metavar="S", help="side of the square images (default: 128)"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE.h5", help="the file to make")
    _add_workers(command)
    command.add_argument("--force", action="store_true", help="replace FILE.h5 if it exists")


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes (default: all cores: %(default)s)",
    )


# The modules are imported when their command runs, so that --help and mistakes answer at once.
def _prepare(options: argparse.Namespace) -> None:
    from setpred.data.clevr import prepare_file

    sha256 = prepare_file(
        options.out,
        options.root,
        split=options.split,
        image_size=options.image_size,
        images=options.images,
        workers=_workers(options),
        force=options.force,
    )
    print(f"{options.out}: complete, sha256 {sha256}")


def _render(options: argparse.Namespace) -> None:
    from setpred.data.scenes import render_file

    sha256 = render_file(
        options.out,
        images=options.images,
        image_size=options.image_size,
        objects=tuple(options.objects),
        seed=options.seed,
        condition=options.condition,
        workers=_workers(options),
        force=options.force,
    )
    print(f"{options.out}: complete, sha256 {sha256}")


def _render_folder(options: argparse.Namespace) -> None:
    from setpred.data.scenes import render_folder

    render_folder(
        options.out,
        split=options.split,
        images=options.images,
        objects=tuple(options.objects),
        seed=options.seed,
        condition=options.condition,
        width=options.width,
        height=options.height,
        workers=_workers(options),
        force=options.force,
    )
    print(f"{options.out}: split {options.split} complete, {options.images} images")


def _compare(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from setpred.data.fidelity import HEADER, compare, mean, table
    from setpred.files import write_atomically

    rows = []
    for row in compare(options.root, split=options.split, first=options.first, pictures=options.pictures):
        print(table(row) if rows else f"{HEADER}\n{table(row)}", flush=True)
        rows.append(row)
    print(table(mean(rows)))
    if options.json is not None:
        figures = dataclasses.asdict(mean(rows)) | {"images": [dataclasses.asdict(row) for row in rows]}
        write_atomically(options.json, json.dumps(figures, indent=1) + "\n")


def _workers(options: argparse.Namespace) -> int:
    if options.workers < 0:
        raise InputError(f"expected --workers of at least 0 (0 works in one process), got {options.workers}")
    return options.workers


def _verify(options: argparse.Namespace) -> None:
    from setpred.data.hdf5 import verify

    header = verify(options.file)
    print(f"{options.file}: {header.images} images of {header.image_size}x{header.image_size}, content as written")


def _info(options: argparse.Namespace) -> None:
    from setpred.data.info import describe

    print(describe(options.file))


def stop_as_on_ctrl_c() -> None:
    """A batch system's request to stop (SIGTERM) counts as Ctrl-C, also where a shell made us ignore that."""
    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, signal.default_int_handler)
