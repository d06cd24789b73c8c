"""Measure the gradients and the symmetry of a trained model: `setpred gradients CHECKPOINT`."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from setpred.checkpoint.load import load_checkpoint, read_checkpoint, training_iterations, training_loss
from setpred.commands.common import Parser, at_least, choose_device, exit_code, write_json
from setpred.commands.evaluate import open_validation_data
from setpred.commands.outputs import check_outputs
from setpred.encoders import ViewTokens
from setpred.errors import InputError
from setpred.inner import Implicit
from setpred.inner.diagnostics import OWN, compare_gradients
from setpred.losses.soft_equivariance import SYMMETRIES
from setpred.metrics import symmetry_distances
from setpred.model import SetPredictor, inputs_of
from setpred.schema import ElementSchema

GRADES = (  # least cosine, verb
    (0.95, "follows"),
    (0.7, "goes roughly with"),
    (0.2, "shares little with"),
    (-0.2, "has nothing in common with"),
    (-math.inf, "points away from"),
)


def described(part: Any) -> str:
    """Describe a differentiation or solver by its class and numbers.

    >>> described(Implicit())
    'Implicit(Identity())'
    """
    if isinstance(part, Implicit):
        return f"Implicit({described(part.solver)}{', best=True' if part.best else ''})"
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(part).items())})"


def equivariance(
    model: SetPredictor,
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    schema: ElementSchema,
    symmetries: Sequence[str],
    iterations: int | None,
) -> dict[str, dict[str, list[float]]]:
    """Measure how far predicted positions are from equivariant: `symmetry_distances` by symmetry, for each example.

    The positions of the input are its first numbers, as many as the schema's `position` has; "moved" is the distance
    that a motion of the input causes, "different" that of different inputs, both in the schema's units. The cutoff of
    the distance is the range of a position, two scales of its field.
    """
    dims = sum(field.numbers for field in schema.position)
    vectors = mask is None and inputs.shape[1] == 1
    views = any(isinstance(part, ViewTokens) for part in model.modules())
    if any(field.period for field in schema.position) or not dims:
        raise InputError(
            f"--symmetries: expected objects with a position, got the schema {schema.name!r} without; leave it out"
        )
    if not model.takes_sets or views or vectors or inputs.shape[-1] < dims or len(inputs) < 2:
        given = "vectors" if vectors else f"{len(inputs)} sets"
        given = f"{given} of {inputs.shape[-1]} numbers" if model.takes_sets and not views else "images"
        raise InputError(
            f"--symmetries: expected at least two input sets whose first {dims} numbers are a position, as those of "
            f"the predicted objects, got {given}; leave it out"
        )

    def positions(moved: torch.Tensor) -> torch.Tensor:
        predicted = model(moved.float(), mask=mask, iterations=iterations).double()
        places = [schema.values(predicted, field.name) for field in schema.position]
        return torch.cat([*places, predicted[..., -1:]], dim=-1)

    cutoff, found = 2 * schema.position[0].scale, {}
    with torch.no_grad():
        for symmetry in symmetries:
            torch.manual_seed(0)
            pair = symmetry_distances(positions, inputs.double(), mask, symmetry=symmetry, dims=dims, cutoff=cutoff)
            found[symmetry] = dict(zip(("moved", "different"), (each.tolist() for each in pair), strict=True))
    return found


def format_symmetries(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Format the results of `equivariance` as lines."""
    lines = [f"  {'distance of positions':22} {'median':>10}   range; 0 if the prediction moves with its input"]
    different = next(iter(found.values()))["different"]
    lines += [f"  {name:22} {_spread(each['moved'])}" for name, each in found.items()]
    return [*lines, f"  {'other inputs':22} {_spread(different)}"]


def format_report(result: dict[str, Any]) -> str:
    """Format the results of `check` as text."""
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
        "  gradient of the training loss for the latent (median over images) and for the parameters, compared with the",
        "  exact implicit gradient (cosine, relative error) and with the unrolled one (cosine)",
        f"  {'':22} " + f"{'cosine':>10} {'rel. error':>10} {'unrolled':>10}" * 2,
    ]
    for name, found in result["agreement"].items():
        numbers = [_median(found[part][key]) for part in ("latent", "parameters") for key in found[part]]
        lines.append(f"  {name:22} " + ("{:10.3f} {:10.2g} {:10.3f}" * 2).format(*numbers))
    return "\n".join([*lines, "", f"  this model's own is {result['own']}", *(f"  {s}" for s in conclusions(result))])


def conclusions(result: dict[str, Any]) -> list[str]:
    """State in sentences what the results of `check` mean: convergence, curvature, damping, the model's own gradient.

    A residual over 0.1 of the first counts as far from an optimum, one over 1e-3 as near to it. Curvature counts as
    negative below -1e-6, and as flat below 1e-4, of the largest.
    """
    start, end = _median(result["residual"][0]), _median(result["residual"][-2])
    left = end / start if start > 0 else 0.0
    ends = list(zip(result["smallest"], result["largest"], strict=True))
    negative = sum(low < -1e-6 * high for low, high in ends)
    condition = _median([high / max(abs(low), 1e-300) for low, high in ends])
    own = result["agreement"][OWN]["latent"]
    cosine, unrolled = _median(own["cosine"]), _median(own["cosine_to_unrolled"])
    damping, singular = result["damping"], result["singular"]
    rest, ratio = f"(|∇L| {left:.2g} of its start)", f"(largest to smallest curvature {condition:.2g})"
    far = (
        f"The descent is far from an optimum {rest}, where the implicit formula does not hold: the unrolled gradient "
        "is the one of what the model computes."
    )
    near = f"The descent is near an optimum {rest}."
    settled = f"The descent is at an optimum for practical purposes {rest}."
    curvature = {
        f"In {negative} of {result['images']} images the objective curves down in some direction: there is no minimum "
        "there, and the exact gradient, which divides by the curvature, need not be the better one.": negative,
        "The Hessian is singular: the objective leaves directions free. Exact and CG are damped by a millionth of the "
        f"largest eigenvalue, {damping:.2g}.": singular,
        f"Some directions are nearly flat {ratio}: they dominate the exact gradient, which divides by the curvature; "
        "--damping removes them.": not (negative or singular) and condition > 1e4,
        f"The objective is well curved {ratio}.": not (negative or singular or condition > 1e4),
        f"Exact and CG are damped by {damping:.2g}, as asked.": damping and not singular,
    }
    grade = next(verb for least, verb in GRADES if not cosine < least)
    return [
        far if left > 0.1 else near if left > 1e-3 else settled,
        *(sentence for sentence, holds in curvature.items() if holds),
        f"The model's own gradient {grade} the exact one (cosine {cosine:.2f} for the latent); its cosine to the "
        f"unrolled one is {unrolled:.2f}.",
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median([value for value in values if not math.isnan(value)] or [math.nan])


def _spread(values: Sequence[float]) -> str:
    return f"{_median(values):10.3g}   {min(values):.3g} to {max(values):.3g}"


def parser() -> Parser:
    """Return the argument parser of the command."""
    options = Parser(
        "gradients",
        "Measure how good the gradients through a model's inner descent are: compare every differentiation with the "
        "exact implicit gradient, and report how far the descent converges and how its objective curves there; and how "
        "equivariant the model is.",
    )
    count = at_least(1)
    options.add_argument("checkpoint", help="a .ckpt of `setpred train`, with a decoder such as IDSPN")
    options.add_shared("--data")
    options.add_argument("--images", type=count, default=16, help="use the first IMAGES images (default: %(default)s)")
    options.add_argument("--iterations", type=count, help="descent steps (default: those of the training)")
    options.add_argument("--steps", type=count, nargs="+", help="steps of truncated methods (default: 1 5 10)")
    options.add_argument("--damping", type=at_least(0, float), help="added to the Hessian in CG and exact (default: 0)")
    options.add_argument(
        "--symmetries",
        nargs="+",
        choices=list(SYMMETRIES),
        default=[],
        help="for models of input sets: also measure how far predicted positions are from moving with the input",
    )
    options.add_shared("--device", "--allow", "--json")
    return options


def check(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run `setpred gradients` with these arguments, `sys.argv` by default; return the results that `--json` writes.

    The image encoder runs as in evaluation, decoder and loss in double precision. See `compare_gradients`.

    Raises:
        InputError: wrong checkpoint, data or options; without `--symmetries`, a decoder without an inner problem; with
            it, a model of images.
    """
    options = parser().parse_args(arguments)
    content = read_checkpoint(options.checkpoint)
    loaded = load_checkpoint(options.checkpoint, allow=options.allow, content=content)
    loaded.require_schema(options.checkpoint)
    loss = training_loss(content, options.allow)
    data = open_validation_data(loaded, options, set_size=getattr(loaded.model.decoder, "set_size", None))
    check_outputs({"--json": options.json}, inputs=[options.checkpoint, options.data or loaded.data["path"]])
    device = choose_device(options.device)
    batch = data.__getitems__(range(len(data)))
    model = loaded.model.to(device)
    given = [None if part is None else part.to(device) for part in inputs_of(batch)]
    iterations = training_iterations(content) if options.iterations is None else options.iterations
    result = {
        "checkpoint": str(options.checkpoint),
        "data": str(options.data or loaded.data["path"]),
        "images": len(data),
        "epoch": loaded.epoch,
        "loss": type(loss).__name__,
    }
    inner = not options.symmetries or hasattr(model.decoder, "differentiation")
    if not inner and (options.steps or options.damping is not None):
        raise InputError(
            f"--steps and --damping: expected a decoder with an inner problem, such as IDSPN, got "
            f"{type(model.decoder).__name__}; leave them out"
        )
    if options.symmetries:
        result["equivariance"] = equivariance(
            model, *given, schema=loaded.schema, symmetries=options.symmetries, iterations=iterations
        )
        result["cutoff"] = 2 * loaded.schema.position[0].scale
        heading = f"Symmetry of {result['checkpoint']}, distances up to {result['cutoff']:g}"
        print("\n".join([heading, *format_symmetries(result["equivariance"]), ""]))
    if inner:
        with torch.no_grad():
            latent = model.encode(*given).double()
        result |= compare_gradients(
            model.decoder.double(),
            loss.to(device).double(),
            latent,
            batch["elements"].to(device).double(),
            iterations=iterations,
            steps=options.steps or (1, 5, 10),
            damping=options.damping or 0.0,
        )
        result["own"] = described(model.decoder.differentiation)
        print(format_report(result))
    write_json(options.json, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred gradients`; return the exit status."""
    return exit_code(lambda: check(arguments) and None)
