"""Score a checkpoint by average precision and draw its predictions: `setpred evaluate CHECKPOINT`."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.commands.common import Parser, at_least, choose_device, exit_code, write_json
from setpred.commands.outputs import check_outputs
from setpred.data.dataset import SetImages, open_data
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.evaluation import PROTOCOLS, Predictions, encoder_autocast, format_report, pad_to_pass, predict, report
from setpred.inner import Problem, Sum, VotingEnergy
from setpred.inner.voting import Ballot
from setpred.model import SetPredictor
from setpred.visualise import Voting, draw_own_training, write_report
from setpred.visualise.report import PICTURED

MARKED = 256  # images of which the worst are drawn with marks


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
    shown: int,
) -> list[Path]:
    """Write the figures of an evaluation, with every iterate of the descent for the first `shown` images."""
    first = data.__getitems__(range(min(shown, len(data))))
    images = pad_to_pass(first["image"].to(device))  # the shape in which they were predicted
    with encoder_autocast(device):
        refined = loaded.model.refine(images, iterations=iterations)
        iterates = torch.stack([elements[: len(first["image"])].float() for elements in refined])
        voting = _voting(loaded.model, images, iterates)
    seen = first["image"]
    if loaded.schema.side:  # the worst of these are drawn
        seen = data.__getitems__(range(min(MARKED, len(data))))["image"]
    return write_report(
        folder,
        images=seen,
        predicted=predictions.predicted,
        target=predictions.target,
        iterates=iterates,
        voting=voting,
        camera=None if loaded.schema.side else np.stack([data.camera(index) for index in first["index"].tolist()]),
        schema=loaded.schema,
        title=title,
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
        raise InputError(f"--thresholds: expected distances above 0, got {text}")
    return number


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser("evaluate", "Score a checkpoint by average precision, and draw the predicted sets.")
    count, steps = at_least(1), at_least(0)
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`, or a release file")
    options.add_shared("--data")
    options.add_argument("--split", help="split of a CLEVR folder: train or val (default: val)")
    options.add_argument("--iterations", type=steps, help="descent steps (default: the model's)")
    options.add_argument("--protocol", choices=list(PROTOCOLS), default="dataset", help="which AP; see docs/metrics.md")
    options.add_argument(
        "--thresholds", type=positive, nargs="+", default=[], metavar="D", help="further distances, in the data's units"
    )
    options.add_argument("--figures", type=Path, metavar="DIR", help="write figures into DIR")
    options.add_argument("--shown", type=count, default=PICTURED, help="images in the figures (default and most: 6)")
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
    if options.shown > PICTURED:
        raise InputError(f"--shown: expected at most {PICTURED}, got {options.shown}")
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    loaded.require_images(options.checkpoint)
    decoder = loaded.model.decoder
    if options.seed is not None:
        if not hasattr(getattr(decoder, "start", None), "seed"):
            raise InputError("--seed: the decoder of this model has no random start to seed")
        decoder.start.seed = options.seed
    data, path = open_validation_data(loaded, options), str(options.data or loaded.data["path"])
    found = data.source.get("split")
    if options.split and found and options.split != found:
        raise InputError(
            f"--split {options.split}: {path} holds the split {found}; leave --split out or give that file"
        )
    check_outputs({"--json": options.json}, {"--figures": options.figures}, inputs=[options.checkpoint, path])
    device, steps = choose_device(options.device), options.iterations
    reading = {"batch_size": options.batch_size, "workers": options.workers}
    predictions = predict(loaded.model, data, iterations=steps, device=device, **reading)
    result = report(predictions, loaded.schema, options.protocol, options.thresholds) | {
        "data": path,
        "checkpoint": str(options.checkpoint),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "iterations": getattr(getattr(decoder, "descent", None), "iterations", None) if steps is None else steps,
        "device": str(device),
    }
    print(format_report(result))
    write_json(options.json, result)
    if options.figures is not None:
        title = f"{options.checkpoint} on {path}"
        drawn = {"iterations": steps, "device": device, "title": title, "shown": options.shown}
        written = figures(options.figures, loaded, data, predictions, **drawn)
        written += draw_own_training(options.figures, options.checkpoint)
        print("figures:", *written, sep="\n  ")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run `setpred evaluate`; return the exit status."""
    return exit_code(lambda: evaluate(arguments) and None)
