"""Score a checkpoint by average precision and draw its predictions: `setpred evaluate CHECKPOINT`."""

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
from setpred.data.dataset import SetImages, open_data
from setpred.decoders import IDSPN
from setpred.errors import InputError, plural
from setpred.evaluation import PROTOCOLS, Predictions, encoder_autocast, format_report, pad_to_pass, predict, report
from setpred.inner import Problem, Sum, VotingEnergy
from setpred.inner.voting import Ballot
from setpred.model import SetPredictor
from setpred.visualise import (
    Case,
    Voting,
    draw_marks,
    draw_own_training,
    has_marks,
    worst_first,
    write_page,
    write_report,
    write_scores,
)
from setpred.visualise.page import has_places
from setpred.visualise.report import MARKED, PICTURED
from setpred.visualise.world import as_pictures, cameras_of, has_world

MOST_SHOWN = 24  # images with marks, and on a page


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

    They show the first `shown` images of CLEVR's world, and otherwise the worst.
    """
    schema = loaded.schema
    if has_world(schema):
        numbers = list(range(min(shown or PICTURED, len(data))))
    else:
        numbers = worst_first(predictions.predicted, predictions.target, schema)[: shown or MARKED]
    inputs, images, iterates = _refined(loaded, data, numbers, iterations=iterations, device=device)
    return write_report(
        folder,
        images=images,
        predicted=predictions.predicted,
        target=predictions.target,
        iterates=iterates,
        voting=_voting(loaded.model, inputs, iterates),
        camera=np.stack([data.camera(number) for number in numbers]),
        schema=schema,
        calibration=loaded.calibration,
        title=title,
        pictured=None if has_world(schema) else numbers,
        names=[data.name(number) for number in numbers],
    )


def _refined(
    loaded: Checkpoint, data: SetImages, numbers: list[int], *, iterations: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A padded pass of images on the device, the images alone, and their iterates `[steps + 1, m, N, D]`."""
    images = data.__getitems__(numbers)["image"]
    inputs = pad_to_pass(images.to(device))  # the shape in which they were predicted
    with encoder_autocast(device):
        refined = loaded.model.refine(inputs, iterations=iterations)
        return inputs, images, torch.stack([elements[: len(numbers)].float() for elements in refined])


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
    pictures = as_pictures(images)
    sets = {"predicted": predicted, "target": target, "schema": schema}
    cases = [Case(data.name(k), picture, predicted[k], target[k]) for k, picture in zip(numbers, pictures, strict=True)]
    step = f"epoch {loaded.epoch}, step {loaded.step:,}"
    about = f"{plural(total, 'image')} of {result['data']}; {step}; protocol {result['protocol']}"
    with tempfile.TemporaryDirectory() as name:
        rated = {"thresholds": thresholds, "calibration": loaded.calibration}
        drawn = write_scores(Path(name), **sets, **rated, say=lambda sentence: None)
        if has_marks(schema) and not has_places(schema):
            few = f"The worst {len(cases)} of {plural(total, 'image')}."
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
    decoder = model.decoder
    energy = _voting_energy(decoder.objective) if isinstance(decoder, IDSPN) else None
    if energy is None:
        return None
    problem = Problem(model.encode(images)[: iterates.shape[1]].float(), iterates[0])
    with torch.autocast(iterates.device.type, enabled=False):  # as in the descent: sums cancel in half precision
        return Voting(
            votes=Ballot.of(problem.latent, energy.set_dim).votes,
            supports=energy.supports(iterates[-1], problem),
            energies=torch.stack([decoder.objective(elements, problem) for elements in iterates]),
        )


def _voting_energy(objective: nn.Module) -> VotingEnergy | None:
    if isinstance(objective, Sum):
        return next(filter(None, map(_voting_energy, objective.objectives)), None)
    return objective if isinstance(objective, VotingEnergy) else None


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
    options = Parser("evaluate", "Score a checkpoint by average precision, and draw the predicted sets.")
    options.usage = "setpred evaluate CHECKPOINT [options]"  # the list below has them
    count, steps = at_least(1), at_least(0)
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`, or a release file")
    options.add_shared("--data")
    options.add_argument("--split", help="split of a CLEVR folder: train or val (default: val)")
    options.add_argument("--iterations", type=steps, help="descent steps (default: the model's)")
    options.add_argument("--protocol", choices=list(PROTOCOLS), default="dataset", help="which AP; see docs/metrics.md")
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
        return open_data(path, split=split, **arguments)
    except InputError as error:
        if options.data:
            raise
        raise InputError(
            f"the validation data of this checkpoint cannot be read ({error}); give --data PATH, or make that file: "
            "data/README.md says how"
        ) from error


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run `setpred evaluate` with these arguments, `sys.argv` by default; return the results that `--json` writes.

    Raises:
        InputError: wrong checkpoint, data or options.
    """
    options = parser().parse_args(arguments)
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    loaded.require_images(options.checkpoint)
    most = PICTURED if options.figures is not None and has_world(loaded.schema) else MOST_SHOWN
    if options.shown is not None and options.shown > most:
        raise InputError(f"--shown: expected at most {most}, got {options.shown}")
    if options.report is not None and options.report.is_dir():
        raise InputError(f"--report {options.report}: expected the name of a file, but it is a folder; add a name")
    schema = loaded.schema.with_tolerances(dict(options.within))
    decoder = loaded.model.decoder
    if options.seed is not None:
        if not hasattr(getattr(decoder, "start", None), "seed"):
            raise InputError("--seed: the decoder of this model has no random start to seed")
        decoder.start.seed = options.seed
    data, path = open_validation_data(loaded, options), str(options.data or loaded.data["path"])
    loaded = replace(loaded, schema=schema)  # not before: the data need no conversion to it
    found = data.source.get("split")
    if options.split and found and options.split != found:
        raise InputError(
            f"--split {options.split}: {path} holds the split {found}; leave --split out or give that file"
        )
    device, steps = choose_device(options.device), options.iterations
    reading = {"batch_size": options.batch_size, "workers": options.workers}
    predictions = predict(loaded.model, data, iterations=steps, device=device, **reading)
    result = report(predictions, loaded.schema, options.protocol, options.thresholds, loaded.calibration) | {
        "data": path,
        "within": loaded.schema.tolerances,
        "checkpoint": str(options.checkpoint),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "iterations": getattr(getattr(decoder, "descent", None), "iterations", None) if steps is None else steps,
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
