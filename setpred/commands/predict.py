"""What a model sees on anybody's images: `python -m setpred predict CHECKPOINT IMAGES... --out predictions.json`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from setpred.checkpoint.load import load_checkpoint
from setpred.commands.common import choose_device, exit_code
from setpred.data.images import decoded, find_images, load_image
from setpred.errors import InputError
from setpred.evaluation import predict_in_passes
from setpred.files import make_folder, replacing
from setpred.model import SetPredictor
from setpred.progress import progress
from setpred.visualise import draw_outlined_image
from setpred.visualise.world import has_world

DRAWN_SIZE = 480  # pixels of an image in a figure


class Prediction(NamedTuple):
    """An image's path, and its elements `[set_size, set_dim]` on the CPU, or why it was skipped."""

    image: str
    elements: Tensor | InputError


def predict(
    model: SetPredictor,
    paths: Iterable[str],
    *,
    image_size: int,
    batch_size: int = 64,
    iterations: int | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    skip_broken: bool = False,
) -> Iterator[Prediction]:
    """Predicts images from files, in order, with memory for a few batches however many there are.

    While the model works on a batch, threads decode the next one. Every pass through the model has the same shape
    (`setpred.evaluation`): a prediction depends on the image and the model alone, not on `batch_size`, the order or
    what else is predicted.

    Args:
        image_size: of the model; images of any size are resized to its square, see `load_image`.
        threads: that decode; see `decoded`.
        skip_broken: broken images, and those with predictions that are not finite, are yielded with what is wrong with
            them, instead of raising that.

    Raises:
        InputError: an image that is missing, damaged or none; predictions that are not finite.
    """
    device = torch.device(device)
    model = model.to(device, memory_format=torch.channels_last).eval()  # the faster layout for convolutions
    names, files = itertools.tee(paths)
    with closing(decoded(files, image_size, ahead=2 * batch_size, threads=threads)) as images:
        found = zip(names, images, strict=True)
        while batch := list(itertools.islice(found, batch_size)):
            broken = [image for _, image in batch if isinstance(image, InputError)]
            if broken and not skip_broken:
                raise broken[0]
            whole = [image for _, image in batch if isinstance(image, np.ndarray)]
            elements = iter(_elements(model, whole, iterations, device) if whole else ())
            for name, image in batch:
                prediction = image if isinstance(image, InputError) else next(elements)
                if isinstance(prediction, Tensor) and not prediction.isfinite().all():
                    prediction = InputError(
                        f"{name}: the model predicts numbers that are not finite; use another checkpoint, or fewer "
                        "--iterations where its descent diverges"
                    )
                    if not skip_broken:
                        raise prediction
                yield Prediction(name, prediction)


def _elements(
    model: SetPredictor, images: Sequence[np.ndarray], iterations: int | None, device: torch.device
) -> Tensor:
    """Elements `[batch, set_size, set_dim]` of images."""
    inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)  # in memory channels-last already
    return predict_in_passes(model, inputs, iterations=iterations)


@dataclass
class Tally:
    """How many images were predicted and skipped."""

    predicted: int = 0
    skipped: int = 0


def write_predictions(
    out: Path, predictions: Iterable[Prediction], decode: Callable[[Tensor], list[dict[str, Any]]]
) -> Tally:
    """Streams predictions into JSON (a list), or JSON Lines if the name ends in .jsonl; the file is whole or absent.

    Each is `{"image": path, "objects": [...]}`. What was skipped is said on stderr and left out.
    """
    tally = Tally()
    first, then, end = ("", "\n", "\n") if out.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    with replacing(out) as partial, partial.open("w", encoding="ascii") as file:
        for image, elements in predictions:
            if isinstance(elements, InputError):
                tally.skipped += 1
                print(f"skipped: {elements}", file=sys.stderr, flush=True)
                continue
            # escaped to ASCII: names of files need not be UTF-8
            text = json.dumps({"image": image, "objects": decode(elements)}, allow_nan=False)
            file.write((then if tally.predicted else first) + text)
            tally.predicted += 1
        file.write(end if tally.predicted else (first + end).strip("\n"))
    return tally


def short(name: str) -> str:
    """A name cut to what leaves room for a number and a suffix in a file's name of 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m setpred predict",
        description="Write the objects that a model sees on images. The images may have any size: each is resized as a "
        "whole to the square that the model was trained on, as CLEVR's of 480x320 were; so one of another shape than "
        "3:2 is squeezed otherwise than the model knows, and is better cut to 3:2 before. Grey and transparent "
        "images become RGB; photos are turned as the camera has noted (EXIF).",
    )
    options.add_argument("checkpoint", help="a .ckpt file written by train.py, or a release file")
    options.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="image files, and folders with such (not in deeper ones)",
    )
    options.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="where to write; .jsonl gets an object a line, else JSON",
    )
    options.add_argument("--batch-size", type=int, default=64, help="images at a time; does not change the result")
    options.add_argument(
        "--threshold", type=float, default=0.5, help="least confidence of an object, from 0 to 1 (default: 0.5)"
    )
    options.add_argument("--iterations", type=int, help="descent steps; the model's own unless given")
    options.add_argument("--threads", type=int, help="that decode images; all cores, at most 16, unless given")
    options.add_argument("--skip-broken", action="store_true", help="leave broken images out instead of stopping")
    options.add_argument("--figures", type=Path, metavar="DIR", help="draw the objects on the images, into DIR")
    options.add_argument("--shown", type=int, default=24, help="how many images to draw, the first ones (default: 24)")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    options.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE.CLASS", help="a part of your own that may be built"
    )
    return options


def run(arguments: Sequence[str] | None = None) -> Tally:
    """Runs the command with these arguments (`sys.argv` unless given).

    Raises:
        InputError: bad checkpoint, images or options, and nothing has been written then; a figure that cannot be
            drawn or written, and the sentence says that the predictions are.
    """
    options = parser().parse_args(arguments)
    for name, least in {"batch_size": 1, "iterations": 0, "threads": 1, "shown": 1}.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if not 0 <= options.threshold <= 1:
        raise InputError(f"--threshold: expected a confidence between 0 and 1, got {options.threshold:g}")
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    loaded.require_images(options.checkpoint)
    schema = loaded.schema
    if options.figures is not None and not has_world(schema):
        raise InputError(f"--figures: schema {schema.name!r} has no 'coords' of three numbers to draw by; leave it out")
    if os.path.isdir(options.out):
        raise InputError(f"--out {options.out}: expected the name of a file, but it is a folder; choose another name")
    if options.figures is not None and (options.figures == options.out or os.path.isfile(options.figures)):
        raise InputError(f"--figures {options.figures}: expected a folder, but it is a file; choose another name")
    paths = find_images(options.images, lambda sentence: print(sentence, file=sys.stderr, flush=True))
    kept: list[Prediction] = []

    def noted() -> Iterator[Prediction]:
        found = predict(
            loaded.model,
            paths,
            image_size=loaded.image_size,
            batch_size=options.batch_size,
            iterations=options.iterations,
            device=choose_device(options.device),
            threads=options.threads,
            skip_broken=options.skip_broken,
        )
        for prediction in progress(found, total=len(paths), description="predicting images"):
            if options.figures is not None and len(kept) < options.shown and isinstance(prediction.elements, Tensor):
                kept.append(prediction)
            yield prediction

    def decode(elements: Tensor) -> list[dict[str, Any]]:
        return schema.decode(elements, threshold=options.threshold)

    start = time.perf_counter()
    tally = write_predictions(options.out, noted(), decode)
    rate = tally.predicted / (time.perf_counter() - start)
    try:
        for number, (image, elements) in enumerate(kept):
            path = make_folder(options.figures) / f"{number:03d}-{short(Path(image).stem)}.png"
            picture = load_image(Path(image), DRAWN_SIZE, advice="it was there a moment ago")
            draw_outlined_image(
                path, picture, decode(elements), schema=schema, about=os.fsencode(image).decode(errors="replace")
            )
    except InputError as error:
        raise InputError(f"{error}; the predictions are in {options.out} all the same") from error
    skipped = f", {tally.skipped:,} broken ones skipped" if options.skip_broken else ""
    print(f"{options.out}: {tally.predicted:,} images, {rate:.4g} a second{skipped}")
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred predict`; return the exit status."""
    interrupted = "interrupted; the file of predictions is whole, or as it was before"
    return exit_code(lambda: run(arguments) and None, interrupted=interrupted)
