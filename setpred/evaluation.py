"""Evaluating a checkpoint: predicted sets, AP, and what lies behind it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from setpred.checkpoint import Checkpoint, load_checkpoint
from setpred.data.dataset import SetImages, as_batch, fitting_workers, open_data
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.faults import listed
from setpred.files import write_atomically
from setpred.inner import Problem, Sum, VotingEnergy
from setpred.inner.voting import Ballot
from setpred.metrics import (
    attribute_report,
    average_precision,
    average_precision_per_image,
    match_by_position,
    threshold_name,
)
from setpred.model import SetPredictor
from setpred.passes import predict_in_passes, whole_pass
from setpred.precision import encoder_autocast
from setpred.progress import progress
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise import Voting, draw_own_training, write_report
from setpred.visualise.report import PICTURED

PROTOCOLS = {"dataset": average_precision, "per-image": average_precision_per_image}
PROTOCOL_MEANING = {
    "dataset": "all predictions of all images ranked together (Slot Attention, DSPN)",
    "per-image": "AP of each image, averaged over all images (the published iDSPN code, which scored 118 images)",
}


class Predictions(NamedTuple):
    """Predicted and real sets of a data set, on the CPU: `[images, set_size, set_dim]`, set sizes may differ.

    index: `[images]`, of the images.
    """

    predicted: Tensor
    target: Tensor
    index: Tensor


def predict(
    model: SetPredictor,
    data: SetImages,
    *,
    iterations: int | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Predictions:
    """Predicts every image of a data set, in order.

    A prediction depends on the image and the model alone, not on `batch_size`, `workers`, the order or what else is
    evaluated: see `setpred.passes`.

    Raises:
        InputError: predictions that are not finite, naming the images.
    """
    device = torch.device(device)
    model = model.to(device, memory_format=torch.channels_last).eval()  # as `setpred.predict` has it: one rounding
    workers = fitting_workers(workers, data, batch_size)
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=as_batch)
    predicted, target, indices = [], [], []
    for batch in progress(loader, total=len(loader), description=f"predicting {len(data)} images, batches"):
        images = batch["image"].to(device, non_blocking=True)
        elements = predict_in_passes(model, images, iterations=iterations)
        if not elements.isfinite().all():
            broken = batch["index"][~elements.isfinite().flatten(1).all(1)].tolist()
            raise InputError(
                f"the model predicts numbers that are not finite for images {listed(broken)} of the data; use another "
                "checkpoint, or fewer --iterations where its descent diverges"
            )
        predicted.append(elements)
        target.append(batch["elements"].clone())  # a worker's tensor would keep two descriptors open
        indices.append(batch["index"].clone())
    return Predictions(*map(torch.cat, (predicted, target, indices)))


def report(predictions: Predictions, schema: ElementSchema, protocol: str) -> dict[str, Any]:
    """AP by threshold, attribute accuracies and distance errors, in plain types.

    Real objects beyond the number of slots count as missed in the AP; "attributes" leaves them out and
    "without_slot" counts them. The order in which the images came does not matter: AP ranks equally confident
    predictions by image, and these are taken by their index.
    """
    order = predictions.index.argsort(stable=True)
    predicted, target = predictions.predicted[order], predictions.target[order]
    scores = PROTOCOLS[protocol](predicted, target, schema=schema)
    assignment = match_by_position(predicted, target, schema=schema)
    without = presence_mask(target) & (assignment < 0)
    return {
        "ap": {threshold_name(threshold): score for threshold, score in scores.items()},
        "images": len(target),
        "protocol": protocol,
        "without_slot": int(without.sum()),
        "attributes": attribute_report(predicted, target, assignment, schema=schema),
    }


def format_report(result: dict[str, Any]) -> str:
    """The report as text for people."""
    details = result["attributes"]
    shares = {"all": details["all_attributes"], **details["accuracy"]}
    distances = {name: value for name, value in details["distance"].items() if not math.isnan(value)}
    lines = [
        f"AP on {result['images']} images of {result['data']}",
        f"protocol {result['protocol']}: {PROTOCOL_MEANING[result['protocol']]}",
        "",
        "  distance under   " + "".join(f"{name:>8}" for name in result["ap"]),
        "  AP in %          " + "".join(f"{100 * score:8.1f}" for score in result["ap"].values()),
        "",
        f"Behind it: {details['objects']} real objects, each matched to a prediction by position alone",
        "  attributes right " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()),
        "  distance         " + ", ".join(f"{name} {value:.3f}" for name, value in distances.items()),
        "  distance under   " + ", ".join(f"{name}: {100 * share:.1f} %" for name, share in details["within"].items()),
        f"  presence         {100 * details['presence_accuracy']:.1f} % of slots right, "
        f"the count right in {100 * details['count_exact']:.1f} % of images",
    ]
    if result["without_slot"]:
        lines.append(
            f"  note: {result['without_slot']} real objects are in images with more objects than the model has slots; "
            "they count as missed"
        )
    return "\n".join(lines)


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


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one that works."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def finite(value: Any) -> Any:
    """JSON has no NaN: what there was nothing to average becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    """evaluate.py: errors a user can mend become one sentence and exit status 2."""
    try:
        evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
