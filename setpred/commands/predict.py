"""Predict the objects of images: `setpred predict CHECKPOINT IMAGES... --out predictions.json`."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.commands.common import Parser, at_least, choose_device, exit_code
from setpred.commands.outputs import check_outputs
from setpred.commands.segmentation import (
    Segments,
    confident_first,
    discovers,
    image_labels,
    require_masks,
    segment,
    segmented_image,
    slot_labels,
    with_background,
)
from setpred.data.annotations import CocoIds
from setpred.data.arrays import INPUTS, SUFFIXES, array_images, input_sets, read_arrays
from setpred.data.dataset import set_inputs
from setpred.data.exporting import (
    FORMATS,
    SEGMENT,
    Found,
    check_coco,
    csv_columns,
    to_coco,
    to_csv,
    to_json,
    to_jsonl,
    to_segment,
)
from setpred.data.images import decoded, find_images, image_stem, load_image, pixel_size, save_mask
from setpred.errors import InputError, plural
from setpred.evaluation import for_evaluation, predict_in_passes
from setpred.files import make_folder, replacing
from setpred.model import SetPredictor, inputs_of
from setpred.progress import progress
from setpred.schema import ElementSchema
from setpred.visualise import Case, draw_marks, draw_outlined_image, draw_segmentation, has_marks
from setpred.visualise.marks import input_picture
from setpred.visualise.world import has_world

RELEASED = Path(__file__).resolve().parents[1] / "released"  # a model and an image within the package
EXAMPLE = ("--out", "setpred-example.json", "--figures", "setpred-example")
DRAWN_SIZE = 480  # pixels of an image in a figure
MOST_SEGMENTS = 255  # in a PNG of indexed colours, besides the background
LONGEST_STEM = 200  # bytes of an image's name in a figure's name; systems allow 255 with number and suffix


class Prediction(NamedTuple):
    """The path of an image, or the number of an input set in its file; and its elements or the error that skipped it.

    Elements are `[set_size, set_dim]`, on the CPU; with masks if they were asked for.
    """

    image: str | int
    elements: Tensor | Segments | InputError


def predict(
    model: SetPredictor,
    paths: Iterable[str],
    *,
    image_size: int,
    padded: bool = False,
    batch_size: int = 64,
    iterations: int | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    skip_broken: bool = False,
    masks: bool = False,
) -> Iterator[Prediction]:
    """Predict image files in order, with memory for a few batches only.

    Threads decode the next batch while the model works. A prediction depends on the image and the model alone, not
    on `batch_size`, the order or the other images (`setpred.evaluation`).

    Args:
        image_size: side of the model's images; images of any size are resized to its square, see `load_image`.
        padded: pad images to squares first, as `setpred data import` does.
        iterations: descent steps; the decoder's own number by default.
        threads: threads that decode; see `decoded`.
        skip_broken: yield the error of an unreadable image or a non-finite prediction instead of raising it.
        masks: predict masks, too; see `setpred.commands.segmentation.segment`.

    Raises:
        InputError: a missing or damaged image, or a file that is no image; non-finite predictions.
    """
    device = torch.device(device)
    model = for_evaluation(model, device)
    names, files = itertools.tee(paths)
    with closing(decoded(files, image_size, padded=padded, ahead=2 * batch_size, threads=threads)) as images:
        found = zip(names, images, strict=True)
        while batch := list(itertools.islice(found, batch_size)):
            readable = [image for _, image in batch if isinstance(image, np.ndarray)]
            elements = iter(())
            if readable:
                inputs = torch.from_numpy(np.stack(readable)).permute(0, 3, 1, 2).to(device)  # stays channels-last
                if masks:
                    passes = segment(model, inputs, iterations=iterations)
                    elements = (Segments(*map(Tensor.cpu, each)) for some in passes for each in zip(*some, strict=True))
                else:
                    elements = iter(predict_in_passes(model, inputs, iterations=iterations))
            for name, image in batch:
                prediction = image if isinstance(image, InputError) else next(elements)
                yield _checked(Prediction(name, prediction), skip_broken)


def predict_sets(
    model: SetPredictor,
    inputs: np.ndarray,
    *,
    batch_size: int = 64,
    iterations: int | None = None,
    device: torch.device | str = "cpu",
    skip_broken: bool = False,
) -> Iterator[Prediction]:
    """Predict input sets `[n, M, K]`, padded with NaN, in order; arguments and errors as in `predict`."""
    device = torch.device(device)
    model, padded = for_evaluation(model, device), bool(np.isnan(inputs).any())
    for start in range(0, len(inputs), batch_size):
        batch = set_inputs(torch.from_numpy(inputs[start : start + batch_size]).to(device), padded=padded)
        found, mask = inputs_of(batch)
        for number, elements in enumerate(predict_in_passes(model, found, mask=mask, iterations=iterations), start):
            yield _checked(Prediction(number, elements), skip_broken)


def _checked(prediction: Prediction, skip_broken: bool) -> Prediction:
    """The prediction, with an error in place of numbers that are not finite; errors are raised unless skipped."""
    name, elements = prediction
    numbers = elements.elements if isinstance(elements, Segments) else elements
    if isinstance(numbers, Tensor) and not numbers.isfinite().all():
        elements = InputError(
            f"{name if isinstance(name, str) else f'input {name}'}: the model predicts numbers that are not finite; "
            "use another checkpoint, or fewer --iterations where its descent diverges"
        )
    if isinstance(elements, InputError) and not skip_broken:
        raise elements
    return Prediction(name, elements)


@dataclass
class Tally:
    """Numbers of predicted and skipped images."""

    predicted: int = 0
    skipped: int = 0


def write_predictions(
    out: Path,
    predictions: Iterable[Prediction],
    decode: Callable[[Any, Any], list[dict[str, Any]]],
    write: Callable[[Found], Iterable[str]],
) -> Tally:
    """Stream predictions into a file, which appears only when complete.

    Skipped inputs are left out and named on stderr.

    Args:
        write: one of the formats of `setpred.data.exporting`.
    """
    tally = Tally()

    def found() -> Found:
        for image, elements in predictions:
            if isinstance(elements, InputError):
                tally.skipped += 1
                print(f"skipped: {elements}", file=sys.stderr, flush=True)
                continue
            yield image, decode(image, elements)
            tally.predicted += 1

    # names of files need not be UTF-8
    with replacing(out) as unfinished, unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for piece in write(found()):
            file.write(piece)
    return tally


def format_name(name: str | None, out: Path) -> str:
    """The name of a format; by default the one that the suffix of the file names, or JSON."""
    return name or (suffix if (suffix := out.suffix.lower()[1:]) in FORMATS else "json")


def choose_format(
    name: str | None, out: Path, schema: ElementSchema, paths: Sequence[str] | None, ids: Path | None
) -> Callable[[Found], Iterable[str]]:
    """The writer of a format, see `format_name`.

    Args:
        paths: of the images; None for input sets.

    Raises:
        InputError: a schema that the format cannot hold; COCO ids that lack an image or a class, or another format.
    """
    name = format_name(name, out)
    if ids is not None and name != "coco":
        raise InputError(f"--coco-ids: expected --format coco, got {name}; leave one of them out")
    if name == "coco":
        if paths is None:
            raise InputError("--format coco: expected a model of images, got one of sets; choose json, jsonl or csv")
        known = None if ids is None else CocoIds.read(ids)
        check_coco(schema, paths, known)
        return partial(to_coco, schema=schema, paths=paths, ids=known)
    if name == "csv":
        csv_columns(schema)
        return partial(to_csv, schema=schema, key="image" if paths is not None else "index")
    return to_json if name == "json" else to_jsonl


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "predict",
        "Predict the objects of images of any size. For a model of imported data they are padded to squares, and "
        "positions are pixels of each image. For other models they are resized to a square, as CLEVR's of 480x320 were "
        "in training; crop images of another aspect ratio to 3:2 first. Grey and transparent images become RGB; "
        "photos are rotated by their EXIF orientation. Without arguments an example runs.",
    )
    options.usage = "setpred predict CHECKPOINT INPUTS... --out FILE [options]"  # the list below has them
    count = at_least(1)
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`, or a release file")
    options.add_argument(
        "images",
        nargs="+",
        metavar="INPUTS",
        help="image files, folders of them (without subfolders), or files of arrays, .npz or HDF5",
    )
    options.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file to write: JSON, or as named: .jsonl, .csv, .coco"
    )
    options.add_argument("--format", choices=FORMATS, help="format of the file, whatever its name")
    options.add_argument(
        "--coco-ids", type=Path, metavar="FILE", help="with --format coco: write a list of results with FILE's ids"
    )
    options.add_argument("--batch-size", type=count, default=64, help="images per batch; no effect on results")
    options.add_argument(
        "--threshold", type=float, help="least confidence of an object, from 0 to 1 (default: a presence of one half)"
    )
    options.add_argument("--iterations", type=at_least(0), help="descent steps (default: the model's)")
    options.add_argument("--threads", type=count, help="decoding threads (default: all cores, at most 16)")
    options.add_argument("--skip-broken", action="store_true", help="skip unreadable images instead of stopping")
    options.add_argument(
        "--masks", type=Path, metavar="DIR", help="write the pixels of each object as PNG into DIR, as RLE into FILE"
    )
    options.add_argument("--figures", type=Path, metavar="DIR", help="draw the objects on the images, into DIR")
    options.add_argument("--shown", type=count, default=24, help="draw the first SHOWN images (default: %(default)s)")
    options.add_shared("--device", "--allow")
    return options


def run(arguments: Sequence[str] | None = None) -> Tally:
    """Run `setpred predict` with these arguments, `sys.argv` by default.

    Raises:
        InputError: wrong checkpoint, images or options, before anything is written; a figure that cannot be drawn or
            written, after the predictions.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if example := not arguments:
        arguments = [str(RELEASED / "quickstart.safetensors"), str(RELEASED / "sample.png"), *EXAMPLE]
        print(f"no arguments, so this is an example: setpred predict {' '.join(arguments)}")
    options = parser().parse_args(arguments)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise InputError(f"--threshold: expected a confidence between 0 and 1, got {options.threshold:g}")
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    schema, folder, sets = loaded.schema, options.figures, loaded.image_size is None
    if discovery := discovers(loaded.model):
        _check_discovery(options)
        padded = bool(loaded.data.get("padded"))
    else:
        loaded.require_schema(options.checkpoint)
        padded = not has_world(schema)
        length = loaded.model.encoder.in_dim if sets and loaded.input_size == 1 else None  # of vectors
        drawable = has_marks(schema, length) or (has_world(schema) and not sets)
        if folder is not None and not drawable:
            raise InputError(f"--figures: schema {schema.name!r} has no 'coords' that can be drawn; leave it out")
    paths = () if sets else _images(options.images)
    read = [options.checkpoint, options.coco_ids, *options.images]
    folders = {"--figures": folder, "--masks": options.masks}
    check_outputs({"--out": options.out}, folders, inputs=read, pictures=paths)
    if segmenting := discovery or options.masks is not None:
        _check_masks(loaded, options, paths)
    if discovery:
        writer = to_json if format_name(options.format, options.out) == "json" else to_jsonl
        write = partial(writer, name="segments")
    else:
        write = choose_format(options.format, options.out, schema, None if sets else paths, options.coco_ids)
    names = ("batch_size", "iterations", "skip_broken")
    chosen = {name: getattr(options, name) for name in names} | {"device": choose_device(options.device)}
    if sets:
        inputs = _input_sets(options.images, loaded.model.encoder.in_dim)
    else:
        inputs = paths
        chosen |= {"threads": options.threads, "image_size": loaded.image_size, "padded": padded}
        chosen |= {"masks": segmenting}
    drawn: list[Prediction] = []

    def predictions() -> Iterator[Prediction]:
        found = (predict_sets if sets else predict)(loaded.model, inputs, **chosen)
        for prediction in progress(found, total=len(inputs), description=f"predicting {'sets' if sets else 'images'}"):
            skipped = isinstance(prediction.elements, InputError)
            if folder is not None and len(drawn) < options.shown and not skipped:
                drawn.append(prediction)
            yield prediction

    def decode(image: str | int, elements: Tensor | Segments) -> list[dict[str, Any]]:
        if isinstance(elements, Segments):
            return decode_segments(image, elements)
        found = loaded.decode(elements, threshold=options.threshold)
        if schema.side and not sets:  # to pixels of this image
            unit = max(pixel_size(image)) / schema.side
            places = [obj[name] for obj in found for name in schema.in_pixels if obj[name] is not None]
            for place in places:
                place[:] = [unit * number for number in place]
        return found

    def decode_segments(image: str, segments: Segments) -> list[dict[str, Any]]:
        shape = {"size": pixel_size(image)[::-1], "padded": padded}
        if discovery:
            labels = slot_labels(loaded.model, segments.masks, **shape)
            found = [to_segment(labels, label) for label in np.unique(labels).tolist() if label]
        else:
            found = decode(image, segments.elements)
            masks = segments.masks[confident_first(segments.elements)[: len(found)]]
            labels = image_labels(with_background(masks[None])[0], **shape)
            for number, obj in enumerate(found):
                obj[SEGMENT] = to_segment(labels, number + 1)
        if options.masks is not None:
            with replacing(mask_path(options.masks, image)) as unfinished, unfinished.open("wb") as file:
                save_mask(file, labels)
        return found

    start = time.perf_counter()
    tally = write_predictions(options.out, predictions(), decode, write)
    rate = tally.predicted / (time.perf_counter() - start)
    try:
        for number, (image, found) in enumerate(drawn):
            elements = found.elements if isinstance(found, Segments) else found
            if sets:
                stem, about, rows = "set", f"set {image} of {os.path.basename(options.images[0])}", inputs[image]
                picture = input_picture(rows[~np.isnan(rows[:, 0])], schema, vector=length is not None)
            else:
                stem = os.fsencode(image_stem(image))[:LONGEST_STEM].decode(errors="ignore")
                about = os.fsencode(image).decode(errors="replace")
                side = loaded.image_size if discovery else DRAWN_SIZE
                picture = load_image(image, side, padded=padded, advice="it was there a moment ago")
            path = make_folder(folder) / f"{number:03d}-{stem}.png"
            if discovery:
                width, height = pixel_size(image)
                of_one = Segments(*(part.unsqueeze(0) for part in found))
                segmented = segmented_image(loaded.model, os.path.basename(about), picture, of_one)
                draw_segmentation(path, [segmented], aspect=1.0 if padded else min(max(width / height, 0.5), 2.0))
            elif sets or not has_world(schema):
                kept, count = elements.clone(), len(decode(image, elements))
                kept[:, -1] = (elements[:, -1].argsort(descending=True, stable=True).argsort() < count).float()
                least = "presence of one half" if options.threshold is None else f"confidence of {options.threshold:g}"
                case = Case(os.path.basename(about), picture, kept, None)
                draw_marks(path, [case], schema=schema, subtitle=f"Objects with a {least} or more.")
            else:
                draw_outlined_image(path, picture, decode(image, elements), schema=schema, about=about)
    except InputError as error:
        raise InputError(f"{error}; the predictions are in {options.out} all the same") from error
    if example:
        print(options.out.read_text(), "The drawing is in ", folder, sep="")
    skipped = f", {tally.skipped:,} skipped" if options.skip_broken else ""
    print(f"{options.out}: {plural(tally.predicted, 'set' if sets else 'image')}, {rate:.4g} a second{skipped}")
    return tally


def mask_path(folder: Path, image: str) -> Path:
    """The PNG with the mask of an image."""
    return folder / f"{image_stem(image)}.png"


def _check_discovery(options: argparse.Namespace) -> None:
    """Raise `InputError` for options of objects with a schema, which a model of discovery does not predict."""
    for name in ("threshold", "coco_ids"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option}: expected no option of objects for a model of discovery; leave it out")
    if (name := format_name(options.format, options.out)) not in ("json", "jsonl"):
        raise InputError(f"--format: expected json or jsonl for the segments of a model of discovery, got {name}")


def _check_masks(loaded: Checkpoint, options: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raise `InputError` if a model has no masks, or they cannot be written."""
    require_masks(loaded.model, "--masks")
    if (size := loaded.model.decoder.set_size) is None or size > MOST_SEGMENTS:
        raise InputError(f"--masks: expected sets of at most {MOST_SEGMENTS} elements, got {size}; leave it out")
    if format_name(options.format, options.out) == "csv":
        raise InputError("--masks: expected --format json, jsonl or coco, which hold masks, got csv; choose another")
    if loaded.schema is not None and SEGMENT in [field.name for field in loaded.schema.fields]:
        raise InputError(
            f"--masks: the schema has a field {SEGMENT!r}, the name of the masks; rename it, or leave it out"
        )
    named: dict[Path, str] = {}
    for path in paths if options.masks is not None else ():
        other = named.setdefault(mask_path(options.masks, path), path)
        if other != path:
            raise InputError(f"--masks: {other} and {path} have masks of one name; predict them into two folders")


def _images(sources: Sequence[str]) -> list[str]:
    """The images of files, of folders and of files of arrays, by their names."""

    def found(source: str) -> list[str]:
        if Path(source).suffix.lower() in SUFFIXES and Path(source).is_file():
            return array_images(source)
        return find_images([source], lambda sentence: print(sentence, file=sys.stderr, flush=True))

    return [image for source in sources for image in found(source)]


def _input_sets(paths: Sequence[str], dim: int) -> np.ndarray:
    """The input sets `[n, M, K]` of the only file, padded with NaN."""
    if len(paths) != 1:
        raise InputError(f"expected one file of arrays for a model of sets, got {len(paths)}; predict them one by one")
    inputs = input_sets(paths[0], read_arrays(paths[0], INPUTS))
    if inputs.shape[-1] != dim:
        raise InputError(f"{paths[0]} has inputs of {inputs.shape[-1]} numbers, but the model takes {dim}")
    return inputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred predict`; return the exit status."""
    interrupted = "interrupted; the file of predictions is complete, or as it was before"
    return exit_code(lambda: run(arguments) and None, interrupted=interrupted)
