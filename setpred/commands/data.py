"""`python -m setpred data`: prepare a CLEVR folder, render built-in scenes, verify and describe the files."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setpred.commands.common import Parser, exit_code
from setpred.commands.outputs import check_outputs
from setpred.errors import InputError
from setpred.workers import available_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred data`; return the exit status."""
    stop_as_on_ctrl_c()

    def run() -> None:
        options = vars(_parser().parse_args(arguments))
        options.pop("run")(**options)

    return exit_code(run, interrupted="interrupted; run the same command again")


def stop_as_on_ctrl_c() -> None:
    """Treat a batch system's SIGTERM as Ctrl-C, and heed Ctrl-C where a shell made us ignore it."""
    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, signal.default_int_handler)


# The modules are imported when their command runs, so that --help and mistakes answer at once.
def _prepare(out: Path, **options: Any) -> None:
    from setpred.data.clevr import prepare_file

    check_outputs({"--out": out}, streams=False)
    print(f"{out}: complete, sha256 {prepare_file(out, **options)}")


def _render(out: Path, **options: Any) -> None:
    from setpred.data.scenes import render_file

    check_outputs({"--out": out}, streams=False)
    print(f"{out}: complete, sha256 {render_file(out, **options)}")


def _render_folder(out: Path, **options: Any) -> None:
    from setpred.data.scenes import render_folder

    check_outputs({}, {"--out": out})
    render_folder(out, **options)
    print(f"{out}: split {options['split']} complete, {options['images']} images")


def _compare(json: Path | None, **options: Any) -> None:
    from json import dumps

    from setpred.data.fidelity import HEADER, compare, mean
    from setpred.files import write_atomically

    pictures = [options["root"] / "images" / options["split"] / "*"]
    check_outputs({"--json": json}, {"--pictures": options["pictures"]}, pictures=pictures)
    rows = []
    for row in compare(**options):
        print(row.line() if rows else f"{HEADER}\n{row.line()}", flush=True)
        rows.append(row)
    print(mean(rows).line())
    if json is not None:
        figures = mean(rows)._asdict() | {"images": [row._asdict() for row in rows]}
        write_atomically(json, dumps(figures, indent=1) + "\n")


TABLES, MASKS = ("--csv", "--coco"), ("--clevr-with-masks",)
TAKEN_BY = {  # options of an import that not every source takes
    **{"images": TABLES, "xy": ("--csv",), "categorical": ("--csv",), "units": (*TABLES, "--npz")},
    **dict.fromkeys(("max_objects", "records", "group"), MASKS),
}


def _import(out: Path, schema: Path | None, workers: int, **options: Any) -> None:
    from setpred.checkpoint.untrusted import read_yaml
    from setpred.data.hdf5 import describe, file_header
    from setpred.data.overrides import Overrides

    sources = {f"--{name.replace('_', '-')}": options.pop(name) for name in ("csv", "coco", "npz", "clevr_with_masks")}
    options = {name: value for name, value in options.items() if value is not None}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise InputError(f"expected one of {', '.join(sources)}, got {' and '.join(given) or 'none'}")
    (kind,) = given
    check_outputs({"--out": out}, inputs=[*sources.values(), schema], streams=False)
    taken = {f"--{name.replace('_', '-')}": TAKEN_BY.get(name, sources) for name in options}
    described = schema is not None and schema.suffix.lower() in (".yaml", ".yml")
    if schema is not None and not described:
        taken[f"--schema {schema}"] = (*TABLES, "--npz")
    for option, takers in taken.items():
        if kind not in takers:
            raise InputError(f"{option}: expected {' or '.join(takers)} with it, got {kind}; leave it out")
    header, hints = None if schema is None or described else file_header(schema), []
    if described:
        content = read_yaml(schema, "a schema with name, max_objects or fields")
        options["overrides"] = Overrides.of(content, str(schema))
    if header is not None:
        options["schema"] = header.schema
    if kind == "--npz":
        from setpred.data.arrays import import_arrays

        import_arrays(sources[kind], out, inputs=None if header is None else header.inputs, **options)
    elif kind in MASKS:
        from setpred.data.clevr_with_masks import import_masks

        import_masks(sources[kind], out, workers=workers, **options)
    else:
        hints = _import_table(kind, sources[kind], out, workers=workers, **options)
    print("\n\n".join([describe(out), *hints]))


def _import_table(
    kind: str, source: Path, out: Path, *, images: Path | None = None, categorical: Sequence[str] = (), **options: Any
) -> list[str]:
    """Import a table; return a sentence for each column that was left out or may be of classes."""
    from setpred.data.annotations import CONFIDENCE, possible_classes, read_coco, read_csv
    from setpred.data.importing import import_images

    if images is None:
        raise InputError(f"{kind}: expected the folder of the images with it; pass --images FOLDER")
    if "schema" in options:
        optional = [field.name for field in options["schema"].fields if field.optional]
        categorical = [*categorical, *(field.name for field in options["schema"].fields if field.categorical)]
    else:
        optional = options["overrides"].optional if "overrides" in options else []
    of_csv = kind == "--csv"
    table = (
        read_csv(source, categorical=categorical, optional=optional) if of_csv else read_coco(source, optional=optional)
    )
    import_images(table, images, out, **options)
    hints = [
        f"left out the column {name!r}, which {'is of predictions' if name == CONFIDENCE else 'numbers the rows'}; "
        f"--categorical {name!r} makes classes of it"
        for name in table.left_out
    ]
    if of_csv and not options.keys() & {"schema", "overrides"}:
        for column, count in possible_classes(table).items():
            hints.append(
                f"{column} has {count} different whole numbers; pass --categorical {column} if they are classes"
            )
    return hints


def _verify(file: Path) -> None:
    from setpred.data.hdf5 import verify

    header = verify(file)
    print(f"{file}: {header}, content as written")


def _info(file: Path) -> None:
    from setpred.data.hdf5 import describe

    print(describe(file))


def _parser() -> Parser:
    parser = Parser(
        "data",
        "Make, check and describe the HDF5 files of inputs and object sets that setpred learns from.",
        epilog="Files appear under their name only when complete; an interrupted command, run again, resumes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], summary: str, more: str = "") -> Callable[..., Any]:
        description = f"{summary[0].upper()}{summary[1:]}. {more}"
        added = commands.add_parser(name, help=summary, description=description)
        added.set_defaults(run=run)
        return added.add_argument

    prepare = command(
        "prepare",
        _prepare,
        "decode and resize the images of a CLEVR folder once",
        "The folder has the CLEVR_v1.0 layout (data/README.md says how to get it); images and objects go to one file.",
    )
    render = command(
        "render",
        _render,
        "render random scenes, no download needed",
        "The scenes follow CLEVR's rules; images and objects go to one file. The same seed gives the same images, "
        "whatever the number of workers.",
    )
    folder = command(
        "render-folder",
        _render_folder,
        "render random scenes into a folder of pictures and JSON as CLEVR's",
        "The scenes are those of `render`, in the CLEVR_v1.0 layout, for other programs and for `prepare`: "
        "images/SPLIT/*.png, scenes/CLEVR_SPLIT_scenes.json and, beyond CLEVR, cameras.jsonl and perhaps "
        "masks/SPLIT/*.png.",
    )
    compare = command(
        "compare",
        _compare,
        "compare the renderer with pictures made elsewhere",
        "Renders every scene of a CLEVR folder with a cameras.jsonl (as of `render-folder`) and prints the differences "
        "from the pictures in it: root mean squared over all pixels and over objects, mean, agreement of the objects' "
        "masks, error of projected centres.",
    )
    imported = command(
        "import",
        _import,
        "import annotated images, or arrays: CSV tables, COCO JSON, .npz files, CLEVR with masks",
        "The columns of a table, or the arrays of a file, become the fields of a schema, which is printed: "
        "docs/own_data.md. Images keep their aspect ratio: they are padded to squares and resized.",
    )
    imported("--csv", type=Path, metavar="FILE", help="table of all images, or a folder with one table per image")
    imported("--coco", type=Path, metavar="FILE", help="COCO JSON, instead of --csv")
    imported("--npz", type=Path, metavar="FILE", help="arrays of sets, vectors or images, .npz or HDF5, instead")
    imported("--clevr-with-masks", type=Path, metavar="FILE", help="the published .tfrecords, or an HDF5 copy, instead")
    imported("--max-objects", type=int, metavar="N", help="of --clevr-with-masks: keep images of at most N objects")
    ends = {"type": int, "nargs": 2, "metavar": ("FIRST", "END")}
    imported("--records", **ends, help="of --clevr-with-masks: the examples FIRST to END - 1 (default: all)")
    imported("--group", metavar="NAME", help="of --clevr-with-masks: the group of an HDF5 copy, such as train")
    imported("--images", type=Path, metavar="FOLDER", help="folder of the images of --csv or --coco")
    imported("--image-size", type=int, metavar="S", help="side of the stored images (default: 64, or 128 if larger)")
    imported("--schema", type=Path, metavar="FILE", help="FILE.h5: take its schema; FILE.yaml: override the inferred")
    imported("--units", choices=("pixels", "relative", "given"), help="of positions (default: pixels)")
    imported("--xy", choices=("centre", "corner"), help="what x and y of a box with width and height are")
    imported("--categorical", nargs="+", metavar="COLUMN", help="columns of numbers that are classes")
    prepare("root", metavar="ROOT", type=Path, help="the folder, with images/ and scenes/ in it")
    prepare("--images", type=int, metavar="N", help="only the first N images (default: all)")
    for add in (render, folder):
        objects = {"type": int, "nargs": 2, "default": (3, 10), "metavar": ("LEAST", "MOST")}
        colours = "every shape has every colour; cogent-a, cogent-b: cubes and cylinders have four each"
        add("--images", type=int, required=True, metavar="N", help="number of images")
        add("--objects", **objects, help="in a scene (default: 3 10)")
        add("--seed", type=int, default=0, metavar="K", help="seed of the scenes (default: 0)")
        add("--condition", default="clevr", help=f"clevr: {colours}, as in CLEVR-CoGenT (default: clevr)")
    for add, what in ((prepare, "those of masks/SPLIT/*.png"), (render, "array instances"), (folder, "masks/SPLIT")):
        add("--masks", action="store_true", help=f"keep the visible pixels of each object ({what})")
    views = "images of each scene, one after the other, from cameras around it (default: one from CLEVR's camera)"
    render("--views", type=int, metavar="V", help=views)
    for add in (prepare, render):
        side = "side of the square images (default: 128)"
        add("--image-size", type=int, default=128, metavar="S", help=side)
    for add in (prepare, folder, compare):
        add("--split", default="val", help="name of the split; CLEVR's test split has no scenes (default: val)")
    folder("--width", type=int, default=480, metavar="W", help="of the pictures (default: 480)")
    folder("--height", type=int, default=320, metavar="H", help="of the pictures (default: 320)")
    for add, name in ((prepare, "FILE.h5"), (render, "FILE.h5"), (imported, "FILE.h5"), (folder, "FOLDER")):
        processes = {"type": int, "default": available_cores(), "metavar": "N"}
        add("--out", type=Path, required=True, metavar=name, help="the result; splits can share a folder")
        add("--workers", **processes, help="processes (default: all cores: %(default)s)")
        add("--force", action="store_true", help="replace the result if it exists")
    compare("root", metavar="ROOT", type=Path, help="the folder, with images/, scenes/ and cameras.jsonl")
    compare("--first", type=int, default=0, metavar="N", help="leave out the images before this one")
    compare("--json", type=Path, metavar="FILE", help="write the figures there, too")
    compare("--pictures", type=Path, metavar="FOLDER", help="draw theirs, ours and 4 times the difference")
    for name, run, summary in (
        ("verify", _verify, "read a file completely and compare its checksum"),
        ("info", _info, "describe the content of a file"),
    ):
        command(name, run, summary)("file", metavar="FILE.h5", type=Path)
    return parser
