"""Score a checkpoint by average precision, or its segmentations, and draw them: `setpred evaluate CHECKPOINT`."""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.commands.common import Parser, at_least, choose_device, exit_code, write_json
from setpred.commands.outputs import check_outputs
from setpred.commands.segmentation import (
    discovers,
    format_segmentation,
    require_masks,
    segmentation_report,
    segmented_images,
    voting_energy,
)
from setpred.data.dataset import SetImages, open_data
from setpred.data.hdf5 import INSTANCES
from setpred.errors import InputError, plural
from setpred.evaluation import PROTOCOLS, Predictions, encoder_autocast, format_report, pad_to_pass, predict, report
from setpred.files import make_folder
from setpred.inner import Problem
from setpred.inner.voting import Ballot
from setpred.model import SetPredictor, inputs_of
from setpred.schema import ElementSchema
from setpred.visualise import (
    Case,
    Voting,
    draw_marks,
    draw_own_training,
    draw_segmentation,
    draw_segmentation_refinement,
    has_marks,
    worst_first,
    write_page,
    write_report,
    write_scores,
)
from setpred.visualise.marks import input_picture
from setpred.visualise.page import has_places
from setpred.visualise.report import MARKED, PICTURED, TRACED
from setpred.visualise.segmentation import WIDEST
from setpred.visualise.world import as_pictures, cameras_of, has_world

MOST_SHOWN = 24  # images with marks or segments, and on a page
DATASET = "dataset"  # the protocol by default


@torch.no_grad()
def figures(
    folder: Path,
    loaded: Checkpoint,
    data: SetImages,
    predictions: Predictions,
    *,
    iterations: int | None,
    device: torch.device,
    title: str,
    shown: int | None,
) -> list[Path]:
    """Write the figures of an evaluation, with every iterate of the descent.

    They show the first `shown` images of CLEVR's world, and otherwise the worst; of several views the first one.
    """
    schema, views = loaded.schema, getattr(data, "first_views", None)
    without_image = loaded.image_size is None and views is None
    if has_world(schema) and not without_image:
        numbers = list(range(min(shown or PICTURED, len(data))))
    else:
        numbers = worst_first(predictions.predicted, predictions.target, schema)[: shown or MARKED]
    of_sets = {
        "predicted": predictions.predicted,
        "target": predictions.target,
        "schema": schema,
        "calibration": loaded.calibration,
        "title": title,
        "names": [data.name(number) for number in numbers],
    }
    if without_image:
        inputs = _pictures(data, schema, numbers)
        return write_report(folder, images=None, inputs=inputs, pictured=numbers[: len(inputs)], **of_sets)
    inputs, images, iterates = _refined(loaded, data, numbers, iterations=iterations, device=device)
    return write_report(
        folder,
        images=images if views is None else views(numbers),
        iterates=iterates,
        voting=_voting(loaded.model, inputs, iterates) if views is None else None,  # tokens of one image
        camera=np.stack([data.camera(number) for number in numbers]),
        pictured=None if has_world(schema) else numbers,
        **of_sets,
    )


def _pictures(data: SetImages, schema: ElementSchema, numbers: list[int]) -> list[np.ndarray | None]:
    """Pictures of input sets, see `input_picture`; an empty list if the sets have no positions to draw."""
    vector = data.inputs.most == 1
    if not has_marks(schema, data.inputs.dim if vector else None):
        return []
    inputs, mask = inputs_of(data.__getitems__(numbers))
    masks = inputs.new_ones(inputs.shape[:2]).bool() if mask is None else mask
    return [
        input_picture(rows[present].numpy(), schema, vector=vector) for rows, present in zip(inputs, masks, strict=True)
    ]


def _refined(
    loaded: Checkpoint, data: SetImages, numbers: list[int], *, iterations: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A padded pass of inputs on the device, the inputs alone, and their iterates `[steps + 1, m, N, D]`."""
    inputs, mask = inputs_of(data.__getitems__(numbers))
    padded = pad_to_pass(inputs.to(device))  # the shape in which images were predicted
    options = {} if mask is None else {"mask": pad_to_pass(mask.to(device))}
    with encoder_autocast(device):
        refined = loaded.model.refine(padded, iterations=iterations, **options)
        return padded, inputs, torch.stack([elements[: len(numbers)].float() for elements in refined])


@torch.no_grad()
def page(
    path: Path,
    loaded: Checkpoint,
    data: SetImages,
    predictions: Predictions,
    result: dict[str, Any],
    *,
    iterations: int | None,
    device: torch.device,
    thresholds: Sequence[float],
    shown: int | None,
) -> Path:
    """Write the evaluation as one page of HTML, with the worst images."""
    schema, total = loaded.schema, len(predictions.target)
    predicted, target = predictions.predicted.double(), predictions.target.double()
    numbers = worst_first(predicted, target, schema)[: shown or MARKED]
    _, images, iterates = _refined(loaded, data, numbers, iterations=iterations, device=device)
    sets, views = loaded.image_size is None, getattr(data, "first_views", None)
    if views is not None:
        pictures = as_pictures(views(numbers))
    elif sets:
        pictures = _pictures(data, schema, numbers) or [None] * len(numbers)
    else:
        pictures = as_pictures(images)
    noun = "set" if sets else "image"
    of_all = {"predicted": predicted, "target": target, "schema": schema}
    cases = [Case(data.name(k), picture, predicted[k], target[k]) for k, picture in zip(numbers, pictures, strict=True)]
    step = f"epoch {loaded.epoch}, step {loaded.step:,}"
    about = f"{plural(total, noun)} of {result['data']}; {step}; protocol {result['protocol']}"
    with tempfile.TemporaryDirectory() as name:
        rated = {"thresholds": thresholds, "calibration": loaded.calibration}
        drawn = write_scores(Path(name), **of_all, **rated, say=lambda sentence: None)
        if not sets and has_marks(schema) and not has_places(schema):
            few = f"The worst {len(cases)} of {plural(total, noun)}."
            drawn.insert(0, draw_marks(Path(name) / "predictions.png", cases, schema=schema, subtitle=few))
        return write_page(
            path,
            title=f"Evaluation of {result['checkpoint']}",
            about=about,
            result=result,
            cases=cases,
            iterates=iterates.cpu(),
            cameras=cameras_of(np.stack([data.camera(number) for number in numbers]), len(numbers)),
            figures=drawn,
            schema=schema,
            calibration=loaded.calibration,
            total=total,
        )


def _voting(model: SetPredictor, images: Tensor, iterates: Tensor) -> Voting | None:
    """The votes behind the iterates of the first images; None unless the objective contains a `VotingEnergy`."""
    if (energy := voting_energy(model)) is None:
        return None
    objective = model.decoder.objective
    problem = Problem(model.encode(images)[: iterates.shape[1]].float(), iterates[0])
    with torch.autocast(iterates.device.type, enabled=False):  # as in the descent: sums cancel in half precision
        return Voting(
            votes=Ballot.of(problem.latent, energy.set_dim).votes,
            supports=energy.supports(iterates[-1], problem),
            energies=torch.stack([objective(elements, problem) for elements in iterates]),
        )


def positive(text: str) -> float:
    """Parse a number above 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected distances above 0, got {text}")
    return number


def tolerance(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER with a number above 0."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not value > 0:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER with a number above 0, got {text}")
    return name, value


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "evaluate", "Score a checkpoint by average precision, or its segmentations, and draw its predictions."
    )
    options.usage = "setpred evaluate CHECKPOINT [options]"  # the list below has them
    count, steps = at_least(1), at_least(0)
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`, or a release file")
    options.add_shared("--data")
    options.add_argument("--split", help="split of a CLEVR folder: train or val (default: val)")
    options.add_argument("--iterations", type=steps, help="descent steps (default: the model's)")
    options.add_argument(
        "--protocol", choices=list(PROTOCOLS), help=f"which AP; see docs/metrics.md (default: {DATASET})"
    )
    options.add_argument(
        "--thresholds", type=positive, nargs="+", default=[], metavar="D", help="further distances, in the data's units"
    )
    options.add_argument(
        "--within",
        type=tolerance,
        nargs="+",
        default=[],
        metavar="NAME=D",
        help="also ask for errors of fields under D",
    )
    options.add_argument(
        "--segmentation",
        action="store_true",
        help="score the support maps of a voting model on the masks of the data, as masks of a discovery model are",
    )
    options.add_argument("--figures", type=Path, metavar="DIR", help="write figures into DIR")
    options.add_argument("--report", type=Path, metavar="FILE.html", help="write scores and the worst images as a page")
    options.add_argument(
        "--shown", type=count, help="images in figures and page (default: 6 of CLEVR's world, else 12)"
    )
    options.add_argument("--images", type=count, help="evaluate only the first IMAGES images")
    options.add_argument("--seed", type=int, help="seed of the descent's random start (default: the model's)")
    options.add_argument(
        "--batch-size", type=count, default=128, help="images per batch (default: %(default)s); no effect on results"
    )
    options.add_argument("--workers", type=steps, default=0, help="reading processes; no effect on results")
    options.add_shared("--device", "--allow", "--json")
    return options


def open_validation_data(loaded: Checkpoint, options: argparse.Namespace, **arguments: Any) -> SetImages:
    """Open the data of `--data`, or the data on which a checkpoint was validated.

    Args:
        arguments: further arguments of `open_data`.

    Raises:
        InputError: the checkpoint names no data, or they cannot be read; the message asks for --data.
    """
    if (path := options.data or loaded.data.get("path")) is None:
        raise InputError(f"{options.checkpoint} does not say what data it was validated on; give --data")
    split = getattr(options, "split", None) or (None if options.data else loaded.data.get("split")) or "val"
    arguments |= {"image_size": loaded.image_size, "schema": loaded.schema, "images": options.images}
    try:
        data = open_data(path, split=split, **arguments)
        if data.inputs is not None and data.inputs.dim != (dim := loaded.model.encoder.in_dim):
            raise InputError(f"{path} has inputs of {data.inputs.dim} numbers, but the model takes {dim}")
        return data
    except InputError as error:
        if options.data:
            raise
        raise InputError(
            f"the validation data of this checkpoint cannot be read ({error}); give --data PATH, or make that file: "
            "data/README.md says how"
        ) from error


def _check_segmenting(loaded: Checkpoint, options: argparse.Namespace) -> None:
    """Raise `InputError` for a model without masks, and for options of other scores."""
    if not discovers(loaded.model):
        require_masks(loaded.model, "--segmentation")
        loaded.require_schema(options.checkpoint)
    for name in ("protocol", "thresholds", "within", "report"):
        if getattr(options, name):
            raise InputError(
                f"--{name}: expected no option of average precision for the scores of a segmentation; leave it out"
            )


def _iterations(decoder: nn.Module, steps: int | None) -> int | None:
    """The iterations of an evaluation: those asked for, or the decoder's own number; None if it does not iterate."""
    return decoder.iterations if steps is None and getattr(decoder, "iterative", False) else steps


def _evaluate_segmentation(
    loaded: Checkpoint, data: SetImages, options: argparse.Namespace, *, path: str, device: torch.device
) -> dict[str, Any]:
    """Score and draw segmentations; return the results that `--json` writes."""
    model, steps = loaded.model, options.iterations
    reading = {"batch_size": options.batch_size, "workers": options.workers, "iterations": steps, "device": device}
    result = segmentation_report(model, data, **reading) | {
        "data": path,
        "checkpoint": str(options.checkpoint),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "iterations": _iterations(model.decoder, steps),
        "device": str(device),
    }
    print(format_segmentation(result))
    write_json(options.json, result)
    if options.figures is not None:
        numbers = range(min(options.shown or PICTURED, len(data)))
        images = segmented_images(model, data, numbers, iterations=steps, device=device)
        style = {"about": f"{options.checkpoint} on {path}", "aspect": WIDEST if has_world(data.schema) else 1.0}
        folder = make_folder(options.figures)
        written = [draw_segmentation(folder / "segmentation.png", images, **style)]
        if len(images[0].labels) > 1:
            traced = images[:TRACED]
            written.append(draw_segmentation_refinement(folder / "segmentation_refinement.png", traced, **style))
        written += draw_own_training(folder, options.checkpoint)
        print("figures:", *written, sep="\n  ")
    return result


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run `setpred evaluate` with these arguments, `sys.argv` by default; return the results that `--json` writes.

    Raises:
        InputError: wrong checkpoint, data or options.
    """
    options = parser().parse_args(arguments)
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    decoder = loaded.model.decoder
    if segmenting := options.segmentation or discovers(loaded.model):
        _check_segmenting(loaded, options)
        most = MOST_SHOWN
    else:
        loaded.require_schema(options.checkpoint)
        schema = loaded.schema.with_tolerances(dict(options.within))
        most = PICTURED if options.figures is not None and has_world(loaded.schema) else MOST_SHOWN
    if options.shown is not None and options.shown > most:
        raise InputError(f"--shown: expected at most {most}, got {options.shown}")
    if options.seed is not None:
        if (start := loaded.model.start) is None:
            raise InputError("--seed: the decoder of this model has no random start to seed")
        start.seed = options.seed
    data = open_validation_data(loaded, options, **({INSTANCES: True} if segmenting else {}))
    path = str(options.data or loaded.data["path"])
    found = data.source.get("split")
    if options.split and found and options.split != found:
        raise InputError(
            f"--split {options.split}: {path} holds the split {found}; leave --split out or give that file"
        )
    files = {"--json": options.json, "--report": options.report}
    check_outputs(files, {"--figures": options.figures}, inputs=[options.checkpoint, path])
    device, steps = choose_device(options.device), options.iterations
    reading = {"batch_size": options.batch_size, "workers": options.workers}
    if segmenting:
        return _evaluate_segmentation(loaded, data, options, path=path, device=device)
    loaded = replace(loaded, schema=schema)  # not before: the data need no conversion to it
    predictions = predict(loaded.model, data, iterations=steps, device=device, **reading)
    protocol = options.protocol or DATASET
    result = report(predictions, loaded.schema, protocol, options.thresholds, loaded.calibration) | {
        "data": path,
        "inputs": "image" if data.inputs is None else data.inputs.noun,
        "within": loaded.schema.tolerances,
        "checkpoint": str(options.checkpoint),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "iterations": _iterations(decoder, steps),
        "device": str(device),
    }
    print(format_report(result))
    write_json(options.json, result)
    drawn = {"iterations": steps, "device": device, "shown": options.shown}
    if options.report is not None:
        thresholds = sorted({*loaded.schema.thresholds, *options.thresholds}, reverse=True)
        page(options.report, loaded, data, predictions, result, thresholds=thresholds, **drawn)
        print(f"report: {options.report}")
    if options.figures is not None:
        title = f"{options.checkpoint} on {path}"
        written = figures(options.figures, loaded, data, predictions, title=title, **drawn)
        written += draw_own_training(options.figures, options.checkpoint)
        print("figures:", *written, sep="\n  ")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run `setpred evaluate`; return the exit status."""
    return exit_code(lambda: evaluate(arguments) and None)
