"""Predict the sets of a data set, the same for every batch size, and score them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from setpred.data.dataset import SetImages, as_batch, fitting_workers
from setpred.errors import InputError, listed
from setpred.metrics import (
    attribute_report,
    average_precision,
    average_precision_per_image,
    match_by_position,
    threshold_name,
)
from setpred.model import SetPredictor
from setpred.progress import progress
from setpred.schema import ElementSchema
from setpred.sets import presence_mask

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
    evaluated: see `setpred.evaluation`.

    Raises:
        InputError: predictions that are not finite, naming the images.
    """
    device = torch.device(device)
    model = model.to(
        device, memory_format=torch.channels_last
    ).eval()  # as `setpred.commands.predict` has it: one rounding
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


PASS = 64  # images; of 128 a pass takes four fifths of the time an image, of one alone ten times as much


def predict_in_passes(model: SetPredictor, images: Tensor, *, iterations: int | None = None) -> Tensor:
    """The predicted set of each image, whatever is predicted beside it.

    Libraries choose the routine of a matrix product by its size, and each rounds in its own way. One rounding, 1e-7,
    is mostly nothing; but where a descent passes a watershed, it ends in another set. So images go through the model
    `PASS` at a time, and a last pass is filled up. On a GPU the encoder runs in bfloat16, all else in float32.

    Args:
        model: in evaluation mode.
        images: `[batch, 3, H, W]`, on the device of the model.
        iterations: overrides the decoder's number of steps.

    Returns:
        float32 `[batch, set_size, set_dim]` on the CPU.
    """
    found = []
    with torch.no_grad(), encoder_autocast(images.device):
        for some in images.split(PASS):
            elements = model(whole_pass(some), iterations=iterations)
            found.append(elements[: len(some)].float().cpu())
    return torch.cat(found)


def whole_pass(rows: Tensor) -> Tensor:
    """At most `PASS` rows, the last one repeated until there are so many; images keep their layout in memory."""
    return rows if len(rows) == PASS else rows[torch.arange(PASS, device=rows.device).clamp(max=len(rows) - 1)]


def encoder_autocast(device: torch.device) -> torch.autocast:
    """The context in which evaluation runs a model: bfloat16 for the encoder on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
