"""The command line of evaluate.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.commands.common import choose_device, exit_code, finite
from setpred.data.dataset import SetImages, open_data
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.evaluation import (
    PROTOCOLS,
    Predictions,
    encoder_autocast,
    format_report,
    predict,
    report,
    whole_pass,
)
from setpred.files import write_atomically
from setpred.inner import Problem, Sum, VotingEnergy
from setpred.inner.voting import Ballot
from setpred.model import SetPredictor
from setpred.visualise import Voting, draw_own_training, write_report
from setpred.visualise.report import PICTURED


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
    """Writes the pictures of an evaluation, with the descent of the first `shown` images iterate by iterate."""
    first = data.__getitems__(range(min(shown, len(data))))
    images = whole_pass(first["image"].to(device))  # as they were predicted
    with encoder_autocast(device):
        iterates = torch.stack(
            [elements[: len(first["image"])].float() for elements in loaded.model.refine(images, iterations=iterations)]
        )
        voting = _voting(loaded.model, images, iterates)
    return write_report(
        folder,
        images=first["image"],
        predicted=predictions.predicted,
        target=predictions.target,
        iterates=iterates,
        voting=voting,
        camera=np.stack([data.camera(index) for index in first["index"].tolist()]),
        schema=loaded.schema,
        title=title,
    )


def _voting(model: SetPredictor, images: Tensor, iterates: Tensor) -> Voting | None:
    """The votes behind these iterates of the first images; None where the decoder's objective is not of votes."""
    decoder = model.decoder
    energy = _voting_energy(decoder.objective) if isinstance(decoder, IDSPN) else None
    if energy is None:
        return None
    problem = Problem(model.encode(images)[: iterates.shape[1]].float(), iterates[0])
    with torch.autocast(iterates.device.type, enabled=False):  # as the descent: sums cancel in half precision
        return Voting(
            votes=Ballot.of(problem.latent, energy.set_dim).votes,
            supports=energy.supports(iterates[-1], problem),
            energies=torch.stack([decoder.objective(elements, problem) for elements in iterates]),
        )


def _voting_energy(objective: nn.Module) -> VotingEnergy | None:
    """The objective itself, or the first of a `Sum` that is one."""
    if isinstance(objective, Sum):
        return next(filter(None, map(_voting_energy, objective.objectives)), None)
    return objective if isinstance(objective, VotingEnergy) else None


def parser() -> argparse.ArgumentParser:
    """The options of evaluate.py."""
    options = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a checkpoint by average precision, and look at the predicted sets."
    )
    options.add_argument("checkpoint", help="a .ckpt file written by train.py, or a release file")
    options.add_argument(
        "--data", help="FILE.h5 or a CLEVR_v1.0 folder; the validation data of the training unless given"
    )
    options.add_argument("--split", help="split of a CLEVR folder: train or val (default val)")
    options.add_argument("--iterations", type=int, help="descent steps; the model's own unless given")
    options.add_argument("--protocol", choices=list(PROTOCOLS), default="dataset", help="which AP; see docs/metrics.md")
    options.add_argument("--figures", type=Path, metavar="DIR", help="write pictures into DIR")
    options.add_argument("--shown", type=int, default=6, help="how many images the pictures show (default and most: 6)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options.add_argument("--images", type=int, help="evaluate the first IMAGES images only")
    options.add_argument("--seed", type=int, help="of the random start of the descent; the model's own unless given")
    options.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="images at a time, best a multiple of 64; does not change the result",
    )
    options.add_argument("--workers", type=int, default=0, help="processes that read; does not change the result")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    options.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE.CLASS", help="a part of your own that may be built"
    )
    return options


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs evaluate.py with these command line arguments (`sys.argv` unless given); returns what `--json` writes.

    Raises:
        InputError: bad checkpoint, data or options.
    """
    options = parser().parse_args(arguments)
    for name in ("iterations", "images", "batch_size", "workers", "shown"):
        least = 0 if name in ("iterations", "workers") else 1
        if (value := getattr(options, name)) is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if options.shown > PICTURED:
        raise InputError(f"--shown: expected at most {PICTURED}, got {options.shown}")
    loaded = load_checkpoint(options.checkpoint, allow=options.allow)
    loaded.require_images(options.checkpoint)
    if options.seed is not None:
        if not hasattr(getattr(loaded.model.decoder, "start", None), "seed"):
            raise InputError("--seed: the decoder of this model has no random start to seed")
        loaded.model.decoder.start.seed = options.seed
    path = options.data or loaded.data.get("path")
    if path is None:
        raise InputError(f"{options.checkpoint} does not say what data it was validated on; give --data")
    if options.data is None and not Path(path).exists():
        raise InputError(
            f"the model was validated on {path}, which is not here; give --data FILE, or make that file: "
            "data/README.md says how"
        )
    data = open_data(
        path,
        split=options.split or ("val" if options.data else loaded.data.get("split", "val")),
        image_size=loaded.image_size,
        schema=loaded.schema,
        images=options.images,
    )
    found = data.source.get("split")
    if options.split and found and options.split != found:
        raise InputError(
            f"--split {options.split}: {path} holds the split {found}; leave --split out or give that file"
        )
    device = choose_device(options.device)
    predictions = predict(
        loaded.model,
        data,
        iterations=options.iterations,
        batch_size=options.batch_size,
        device=device,
        workers=options.workers,
    )
    descent = getattr(loaded.model.decoder, "descent", None)
    iterations = options.iterations if options.iterations is not None else getattr(descent, "iterations", None)
    result = report(predictions, loaded.schema, options.protocol) | {
        "data": str(path),
        "checkpoint": str(options.checkpoint),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "iterations": iterations,
        "device": str(device),
    }
    print(format_report(result))
    if options.json is not None:
        write_atomically(options.json, json.dumps(finite(result), indent=2) + "\n")
    if options.figures is not None:
        written = figures(
            options.figures,
            loaded,
            data,
            predictions,
            iterations=options.iterations,
            device=device,
            title=f"{options.checkpoint} on {path}",
            shown=options.shown,
        )
        written += draw_own_training(options.figures, options.checkpoint)
        print("pictures:", *written, sep="\n  ")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run evaluate.py; return the exit status."""
    return exit_code(lambda: evaluate(arguments) and None)
