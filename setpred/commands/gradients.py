"""How good the gradients of a trained model's inner problem are: `python -m setpred gradients CHECKPOINT`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from setpred.checkpoint.load import load_checkpoint, read_checkpoint, training_iterations, training_loss
from setpred.commands.common import choose_device, exit_code, finite
from setpred.data.dataset import open_data
from setpred.errors import InputError
from setpred.files import write_atomically
from setpred.inner import Implicit
from setpred.inner.diagnostics import OWN, compare_gradients


def described(part: Any) -> str:
    """A differentiation or solver with its numbers, as one would write it.

    >>> described(Implicit())
    'Implicit(Identity())'
    """
    if isinstance(part, Implicit):
        return f"Implicit({described(part.solver)}{', best=True' if part.best else ''})"
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(part).items())})"


def format_report(result: dict[str, Any]) -> str:
    """The report as text for people."""
    residual, iterations = result["residual"], result["iterations"]
    shown = sorted({0, *(2**k for k in range(iterations.bit_length())), iterations - 1, iterations} - {-1})
    lines = [
        f"Gradients of the inner problem of {result['checkpoint']}",
        f"{result['images']} images of {result['data']}, {iterations} descent steps, {result['loss']}, float64",
        "",
        f"  {'|∇L| after step':22} {'median':>10}   range over the images",
        *(f"  {step:22} {_spread(residual[step])}" for step in shown),
        "",
        f"  {'eigenvalue of ∂²L/∂Y²':22} {'median':>10}   after step {iterations - 1}, where gradients are taken",
        *(f"  {name:22} {_spread(result[name])}" for name in ("smallest", "largest")),
        "",
        "  gradient of the training loss against the exact implicit one (last column: against the unrolled one)",
        f"  {'':22} {'for the latent: median (worst) over images':^54}   {'for the parameters':^31}",
        f"  {'':22} {'cosine':>17} {'relative error':>21} {'unrolled':>14}   {'cosine':>9} {'rel. error':>11}"
        f" {'unrolled':>9}",
    ]
    for name, found in result["agreement"].items():
        latent, parameters = found["latent"], {key: values[0] for key, values in found["parameters"].items()}
        lowest, highest = _worst(min, latent["cosine"]), _worst(max, latent["relative_error"])
        lines.append(
            f"  {name:22} {_median(latent['cosine']):8.3f} {f'({lowest:.3f})':>8}"
            f" {_median(latent['relative_error']):11.2g} {f'({highest:.2g})':>9}"
            f" {_median(latent['cosine_to_unrolled']):14.3f}   {parameters['cosine']:9.3f}"
            f" {parameters['relative_error']:11.2g} {parameters['cosine_to_unrolled']:9.3f}"
        )
    return "\n".join([*lines, "", f"  this model's own is {result['own']}", *(f"  {s}" for s in in_words(result))])


def in_words(result: dict[str, Any]) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences = []
    start, end = _median(result["residual"][0]), _median(result["residual"][-2])
    left = end / start if start > 0 else 0.0
    if left > 0.1:
        sentences.append(
            f"The descent is far from an optimum (|∇L| {left:.2g} of its start), where the implicit formula does not "
            "hold: the unrolled gradient is the one of what the model computes."
        )
    elif left > 1e-3:
        sentences.append(f"The descent has neared an optimum (|∇L| {left:.2g} of its start).")
    else:
        sentences.append(f"The descent is at an optimum for practical purposes (|∇L| {left:.2g} of its start).")
    images, largest = result["images"], result["largest"]
    negative = sum(low < -1e-6 * high for low, high in zip(result["smallest"], largest, strict=True))
    condition = _median([high / max(abs(low), 1e-300) for low, high in zip(result["smallest"], largest, strict=True)])
    if negative:
        sentences.append(
            f"In {negative} of {images} images the objective curves down in some direction: no minimum there, and the "
            "exact gradient, which divides by the curvature, has no claim to be the better one."
        )
    if result["singular"]:
        sentences.append(
            "The objective leaves directions free, its Hessian is singular: exact and CG are damped by a millionth of "
            f"its largest eigenvalue, {result['damping']:.2g}."
        )
    elif not negative and condition > 1e4:
        sentences.append(
            f"Some directions are nearly flat (largest to smallest curvature {condition:.2g}): they rule the exact "
            "gradient, which divides by the curvature; --damping takes them out."
        )
    elif not negative:
        sentences.append(f"The objective is well curved (largest to smallest curvature {condition:.2g}).")
    if result["damping"] and not result["singular"]:
        sentences.append(f"Exact and CG are damped by {result['damping']:.2g}, as asked.")
    own = result["agreement"][OWN]["latent"]
    cosine, unrolled = _median(own["cosine"]), _median(own["cosine_to_unrolled"])
    grade = next(word for least, word in _GRADES if not cosine < least)
    sentences.append(
        f"The model's own gradient {grade} the exact one (cosine {cosine:.2f} for the latent); its cosine to the "
        f"unrolled one is {unrolled:.2f}."
    )
    return sentences


_GRADES = (
    (0.95, "follows"),
    (0.7, "goes roughly with"),
    (0.2, "shares little with"),
    (-0.2, "has nothing in common with"),
    (-math.inf, "points away from"),
)


def _numbers(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _median(values: Sequence[float]) -> float:
    return statistics.median(_numbers(values) or [math.nan])


def _worst(pick: Callable[..., float], values: Sequence[float]) -> float:
    return pick(_numbers(values), default=math.nan)


def _spread(values: Sequence[float]) -> str:
    return f"{_median(values):10.3g}   {min(values):.3g} to {max(values):.3g}"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m setpred gradients",
        description="Say how good the gradients through a model's inner descent are: every way to differentiate it "
        "against the exact implicit gradient, how far the descent comes, and how its objective curves there.",
    )
    options.add_argument("checkpoint", help="a .ckpt file written by train.py, with a decoder such as IDSPN")
    options.add_argument(
        "--data", help="FILE.h5 or a CLEVR_v1.0 folder; the validation data of the training unless given"
    )
    options.add_argument("--images", type=int, default=16, help="how many, the first ones (default: 16)")
    options.add_argument("--iterations", type=int, help="descent steps; those of the training unless given")
    options.add_argument(
        "--steps", type=int, nargs="+", default=[1, 5, 10], help="of what is cut off after some (default: 1 5 10)"
    )
    options.add_argument("--damping", type=float, default=0.0, help="added to the Hessian in CG and exact (default: 0)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    options.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE.CLASS", help="a part of your own that may be built"
    )
    return options


def check(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command with these arguments (`sys.argv` unless given); returns what `--json` writes.

    The image encoder runs as in evaluation, decoder and loss in double precision.

    Raises:
        InputError: bad checkpoint, data or options; a decoder without an inner problem.
    """
    options = parser().parse_args(arguments)
    smallest = {"images": 1, "iterations": 1, "damping": 0}
    for name, least in smallest.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise InputError(f"--{name}: expected at least {least}, got {value}")
    if min(options.steps) < 1:
        raise InputError(f"--steps: expected at least 1, got {min(options.steps)}")
    content = read_checkpoint(options.checkpoint)
    loaded = load_checkpoint(options.checkpoint, allow=options.allow, content=content)
    loaded.require_images(options.checkpoint)
    loss = training_loss(content, options.allow)
    path = options.data or loaded.data.get("path")
    if path is None:
        raise InputError(f"{options.checkpoint} does not say what data it was validated on; give --data")
    try:
        data = open_data(
            path,
            split="val" if options.data else loaded.data.get("split") or "val",
            image_size=loaded.image_size,
            set_size=getattr(loaded.model.decoder, "set_size", None),
            schema=loaded.schema,
            images=options.images,
        )
    except InputError as error:
        if options.data:
            raise
        raise InputError(
            f"the validation data of this checkpoint cannot be read ({error}); give --data with images like those"
        ) from error
    device = choose_device(options.device)
    batch = data.__getitems__(range(len(data)))
    model = loaded.model.to(device)
    with torch.no_grad():
        latent = model.encode(batch["image"].to(device)).double()
    iterations = training_iterations(content) if options.iterations is None else options.iterations
    result = {
        "checkpoint": str(options.checkpoint),
        "data": str(path),
        "images": len(data),
        "epoch": loaded.epoch,
        "loss": type(loss).__name__,
    } | compare_gradients(
        model.decoder.double(),
        loss.to(device).double(),
        latent,
        batch["elements"].to(device).double(),
        iterations=iterations,
        steps=options.steps,
        damping=options.damping,
    )
    result["own"] = described(model.decoder.differentiation)
    print(format_report(result))
    if options.json is not None:
        write_atomically(options.json, json.dumps(finite(result), indent=2) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred gradients`; return the exit status."""
    return exit_code(lambda: check(arguments) and None)
