"""Predict the sets of a data set, independently of the batch size, and score them.

Libraries choose the routine of a matrix product by its size, and each routine rounds differently. A rounding error of
1e-7 is mostly harmless, but near a watershed of the inner objective it makes the descent end in another set. So every
pass through the model has the same shape: `PASS` images, of which a smaller batch repeats its last one. Input sets of
different sizes are grouped: each is padded to the next power of two, whatever the sizes of the others.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from setpred.data.dataset import SetImages, as_batch, fitting_workers
from setpred.errors import InputError, listed, plural
from setpred.metrics import (
    attribute_report,
    average_precision,
    average_precision_per_image,
    box_average_precision,
    match_by_position,
    reliability,
    right_predictions,
    threshold_name,
)
from setpred.metrics.box_precision import columns
from setpred.model import SetPredictor, inputs_of
from setpred.progress import progress
from setpred.schema import UNCALIBRATED, Calibration, ElementSchema
from setpred.sets import presence_mask, present_first, set_sizes

PASS = 64  # images; a pass of 128 takes 0.8 of the time per image, a pass of 1 ten times as much
PROTOCOLS = {"dataset": average_precision, "per-image": average_precision_per_image}
PROTOCOL_MEANING = {
    "dataset": "all predictions of all inputs ranked together (Slot Attention, DSPN)",
    "per-image": "AP of each image, averaged over all images (the published iDSPN code, which scored 118 images)",
}


class Predictions(NamedTuple):
    """Predicted and real sets `[images, set_size, set_dim]` and the images' `index` `[images]`, on the CPU."""

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
    """Predict the sets of all images of a data set, in order.

    A prediction depends on the image and the model alone, not on `batch_size`, `workers` or the other images.

    Args:
        iterations: descent steps; the decoder's own number by default.
        workers: processes that read images.

    Raises:
        InputError: non-finite predictions; the message names the images.
    """
    device = torch.device(device)
    model = for_evaluation(model, device)
    workers = fitting_workers(workers, data, batch_size)
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=as_batch)
    predicted, target, indices = [], [], []
    for batch in progress(loader, total=len(loader), description=f"predicting {len(data)} inputs, batches"):
        inputs, mask = (part if part is None else part.to(device, non_blocking=True) for part in inputs_of(batch))
        elements = predict_in_passes(model, inputs, mask=mask, iterations=iterations)
        check_finite(elements, batch["index"])
        predicted.append(elements)
        target.append(batch["elements"].clone())  # a worker's own tensor would keep two file descriptors open
        indices.append(batch["index"].clone())
    return Predictions(*map(torch.cat, (predicted, target, indices)))


def check_finite(elements: Tensor, index: Tensor) -> None:
    """Raise `InputError` if predictions are not finite, naming the inputs by their `index`."""
    if not elements.isfinite().all():
        wrong = index[: len(elements)][~elements.isfinite().flatten(1).all(1).cpu()].tolist()
        raise InputError(
            f"the model predicts numbers that are not finite for inputs {listed(wrong)} of the data; use another "
            "checkpoint, or fewer --iterations where its descent diverges"
        )


def for_evaluation(model: SetPredictor, device: torch.device) -> SetPredictor:
    """Move a model to a device, in the memory format and mode of every evaluation."""
    return model.to(device, memory_format=torch.channels_last).eval()  # the faster layout for convolutions


def predict_in_passes(
    model: SetPredictor, inputs: Tensor, *, mask: Tensor | None = None, iterations: int | None = None
) -> Tensor:
    """Predict the set of each image or input set, `PASS` of them at a time.

    On a GPU the encoder runs in bfloat16, all else in float32.

    Args:
        model: a model in evaluation mode.
        inputs: images `[batch, 3, H, W]`, or sets `[batch, n, in_dim]`, on the model's device.
        mask: present elements of the sets, bool `[batch, n]`; without, the sets have one size.
        iterations: descent steps; the decoder's own number by default.

    Returns:
        float32 `[batch, set_size, set_dim]` on the CPU.
    """
    found, order = [], []
    with torch.no_grad(), encoder_autocast(inputs.device):
        for group, rows, present in _of_one_width(inputs, mask):
            order.append(group)
            for start in range(0, len(rows), PASS):
                some, masked = (part if part is None else part[start : start + PASS] for part in (rows, present))
                options = {} if masked is None else {"mask": pad_to_pass(masked)}
                elements = model(pad_to_pass(some), iterations=iterations, **options)
                found.append(elements[: len(some)].float().cpu())
    return torch.cat(found)[torch.cat(order).argsort()]


def _of_one_width(inputs: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield positions in the batch, inputs and mask of the inputs of each width."""
    if mask is None:
        yield torch.arange(len(inputs)), inputs, None
        return
    rows, present = present_first(inputs, mask)
    # as Python's numbers: a float's logarithm may miss a power of two
    widths = torch.tensor([1 << max(0, size - 1).bit_length() for size in set_sizes(rows, present).int().tolist()])
    missing = max(0, int(widths.max()) - rows.shape[1])
    rows, present = functional.pad(rows, (0, 0, 0, missing)), functional.pad(present, (0, missing))
    for width in widths.unique().tolist():
        group = (widths == width).nonzero()[:, 0]
        yield group, rows[group, :width], present[group, :width]


def pad_to_pass(rows: Tensor) -> Tensor:
    """Repeat the last of at most `PASS` rows until there are `PASS`; images keep their memory format."""
    return rows if len(rows) == PASS else rows[torch.arange(PASS, device=rows.device).clamp(max=len(rows) - 1)]


def encoder_autocast(device: torch.device) -> torch.autocast:
    """Return the context in which evaluation runs a model: bfloat16 for the encoder on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def report(
    predictions: Predictions,
    schema: ElementSchema,
    protocol: str,
    thresholds: Sequence[float] = (),
    calibration: Calibration = UNCALIBRATED,
) -> dict[str, Any]:
    """Compute AP at the schema's thresholds and further ones, attribute accuracies and distance errors, in plain types.

    With a schema of boxes, "box_ap" has what `box_average_precision` returns. "calibration" has what `reliability`
    returns for the confidences, with the slope and offset of the calibration and what counts as "right".

    Real objects beyond the number of slots count as missed in the AP; "attributes" leaves them out and
    "without_slot" counts them. The order of the predictions does not matter: AP ranks equally confident predictions
    by the index of their image.
    """
    order = predictions.index.argsort(stable=True)
    predicted, target = predictions.predicted[order], predictions.target[order]
    thresholds = sorted({*schema.thresholds, *thresholds}, reverse=True)
    scores = PROTOCOLS[protocol](predicted, target, thresholds=thresholds, schema=schema)
    assignment = match_by_position(predicted, target, schema=schema)
    of_boxes = {"schema": schema, "areas": schema.side is not None}  # which are in pixels
    boxes = {"box_ap": box_average_precision(predicted, target, **of_boxes)} if schema.has_boxes else {}
    right, criterion = right_predictions(predicted, target, schema=schema)
    confidence = calibration.confidence(predicted[..., -1])
    return boxes | {
        "ap": {threshold_name(threshold): score for threshold, score in scores.items()},
        "images": len(target),
        "protocol": protocol,
        "calibration": calibration.to_dict() | {"right": criterion} | reliability(confidence, right.numpy()),
        "without_slot": int((presence_mask(target) & (assignment < 0)).sum()),
        "attributes": attribute_report(predicted, target, assignment, thresholds=thresholds, schema=schema),
    }


def format_report(result: dict[str, Any]) -> str:
    """Format what `report` returns, with the name of its "data" and the noun of its "inputs" (image), as text."""
    details, noun = result["attributes"], result.get("inputs", "image")
    shares = {"all": details["all_attributes"], **details["accuracy"]}
    distances = {name: value for name, value in details["distance"].items() if not math.isnan(value)}
    asked = ", ".join(f"{name} within {most:g}" for name, most in result.get("within", {}).items())
    unit = f" {details['unit']}" if details["unit"] else ""
    lines = [
        f"AP on {plural(result['images'], noun)} of {result['data']}",
        f"protocol {result['protocol']}: {PROTOCOL_MEANING[result['protocol']]}",
        *([f"a prediction also needs {asked}"] if asked else []),
        "",
        "  distance under   " + "".join(f"{name:>8}" for name in result["ap"]),
        "  AP in %          " + "".join(f"{100 * score:8.1f}" for score in result["ap"].values()),
        "",
        *_box_table(result.get("box_ap")),
        f"Details: {details['objects']} real objects, each matched to a prediction by position alone",
        "  attributes right " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()),
        "  distance         " + ", ".join(f"{name} {value:.3f}" for name, value in distances.items()) + unit,
        "  distance under   " + ", ".join(f"{name}: {100 * share:.1f} %" for name, share in details["within"].items()),
        *(_field_line(name, error) for name, error in details["errors"].items()),
        f"  presence         {100 * details['presence_accuracy']:.1f} % of slots right, "
        f"the count right in {100 * details['count_exact']:.1f} % of {noun}s",
    ]
    calibration = result["calibration"]
    if calibration["predictions"]:
        lines.append(
            f"  confidence       {100 * calibration['ece']:.1f} % off the share that is right "
            f"({calibration['right']}) in the mean: the expected calibration error"
        )
    if result["without_slot"]:
        lines.append(
            f"  note: {result['without_slot']} real objects are in {noun}s with more objects than the model has slots; "
            "they count as missed"
        )
    return "\n".join(lines)


def _field_line(name: str, error: dict[str, Any]) -> str:
    """The errors of one continuous field."""
    line = f"  {name:<16} " + ", ".join(f"{key} {error[key]:.3f}" for key in ("mean", "median", "p90"))
    line += f" {error['unit']} off" if error["unit"] else " off"
    shares = [
        f"{100 * error[key]:.1f} % {key}" for key in ("found", "invented") if not math.isnan(error.get(key, math.nan))
    ]
    return "; ".join([line, *shares])


def _box_table(scores: dict[str, Any] | None) -> list[str]:
    """Lines of the scores of boxes, all classes first."""
    if scores is None:
        return []
    names = columns(scores)
    rows = {"all classes": scores} | (scores["classes"] if len(scores["classes"]) > 1 else {})
    width = max(16, *map(len, rows))
    return [
        "Boxes by intersection over union, as COCO scores them, in %",
        f"  {'':<{width}} " + "".join(f"{name:>8}" for name in names) + f"{'boxes':>8}",
        *(
            f"  {name:<{width}} " + "".join(f"{100 * row[score]:8.1f}" for score in names) + f"{row['boxes']:8}"
            for name, row in rows.items()
        ),
        "",
    ]
