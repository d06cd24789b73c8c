"""Export a model by torch.export: a program for batches of any size that needs torch, but not setpred."""

import copy
import io
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from setpred.checkpoint.load import Checkpoint
from setpred.data.scenes import render_records
from setpred.decoders import IDSPN
from setpred.encoders import Normalised
from setpred.errors import InputError, reason
from setpred.inner import Problem
from setpred.inner.descent import State
from setpred.inner.differentiation import plain_step
from setpred.inner.objectives import Energy
from setpred.model import SetPredictor
from setpred.nn import unit_images
from setpred.sets import fill_absent

SCHEMA_FILE = "schema.json"  # extra file of the program: the meaning of an element's numbers
LARGEST_ERROR = 1e-3  # between program and model; rounding over a complete descent gives a hundredth of that
COMPARED, SINGLE = 24, 8  # images that both predict, and how many of them also one by one
ALIKE = 0.75  # least share of images within that error


def unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float in [0, 1]; return float images, and input sets, unchanged.

    As `setpred.nn.unit_images`, but without an `if`, which the tracer would decide.
    """
    if images.ndim == 3:
        return images
    of_bytes = images.new_full((), 0.5) == 0  # a byte rounds 0.5 down
    return torch.where(of_bytes, images / 255, images * 1.0)


class DescentProgram(nn.Module):
    """An `IDSPN` model as `while_loop` over one step of the descent, since forty steps are ten thousand operations.

    torch.export does not trace `autograd.grad`, but `make_fx` does.
    """

    def __init__(self, model: SetPredictor, *inputs: Tensor) -> None:
        super().__init__()
        self.model = model
        decoder: IDSPN = model.decoder

        def step(latent: Tensor, initial: Tensor, iterate: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
            energy = Energy(decoder.objective, Problem(latent, initial))
            # a velocity of zeros makes the first step equal to the others, and a loop must not return its inputs
            after = plain_step(energy, State(iterate, velocity), decoder.descent)
            return after.iterate, torch.zeros_like(velocity) if after.velocity is None else after.velocity

        latent, initial = self.start(*inputs)
        # a copy: the tracer merges equal tensors into one input, and objectives may read both
        self.step = traced(step, latent, initial, initial.clone(), torch.zeros_like(initial))

    def start(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent vectors, and the first iterate of the descent."""
        decoder, latent = self.model.decoder, self.model.encode(unit(inputs), mask)
        return latent, decoder.descent.project(decoder.start(latent)).contiguous()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        latent, initial = self.start(inputs, mask)
        iterations = self.model.decoder.descent.iterations

        def unfinished(done: Tensor, iterate: Tensor, velocity: Tensor) -> Tensor:
            return done < iterations

        def advance(done: Tensor, iterate: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (done + 1, *self.step(latent, initial, iterate, velocity))

        return while_loop(unfinished, advance, (torch.tensor(0), initial.clone(), torch.zeros_like(initial)))[1]


class _FlatLinear(TorchFunctionMode):
    """Linear layers as matrix products, since within torch.func.grad torch's own fix the traced batch size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear or args[0].ndim <= 2:
            return func(*args, **(kwargs or {}))
        rows, weight, *rest = args
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        product = rows.flatten(0, -2) @ weight.t()
        return (product if bias is None else product + bias).view(*rows.shape[:-1], weight.shape[0])


@torch.no_grad()
def traced(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """Trace a function of tensors with its inner gradients, for first axes of any length."""
    with _FlatLinear():
        return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*examples)


@torch.no_grad()
def export_program(loaded: Checkpoint) -> bytes:
    """Export the model of a checkpoint to the content of a .pt2 file, and check it against the model.

    The program maps images `[batch, 3, size, size]`, uint8 or float32 in [0, 1], to elements
    `[batch, set_size, set_dim]`, as the model in evaluation. That of a model of sets maps input sets
    `[batch, n, in_dim]` in their units and a mask bool `[batch, n]`, True where an element is present, for any n > 1;
    of a model of single vectors n is 1. Load it with `torch.export.load(FILE).module()`; its extra file `SCHEMA_FILE`
    describes the elements.

    The check compares the predictions of `COMPARED` built-in scenes, or random sets: for a share of `ALIKE` inputs all
    elements must agree to `LARGEST_ERROR`. A descent can turn rounding into another set for a few images; another
    function differs for all. Raises `InputError` if the program differs, or torch cannot trace or export the model.
    """
    buffer = io.BytesIO()
    model = copy.deepcopy(loaded.model).cpu().eval().requires_grad_(False)
    try:
        examples = _sets(loaded, model) if loaded.image_size is None else (_scenes(loaded.image_size),)
        # the tracer identifies axes of equal length: choose a batch size that no other axis has
        others = {*examples[0].shape, *model.encode(*examples).shape, *_predicted(model, *examples).shape}
        batch = next(number for number in itertools.count(3) if number not in others)
        traced_on = tuple(part[:1].expand(batch, *part.shape[1:]).clone() for part in examples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            # exactly this class, since a subclass may compute something else
            last = type(model.decoder) is IDSPN and not getattr(model.decoder.differentiation, "best", False)
            program = (
                DescentProgram(model, *traced_on)
                if last
                else traced(lambda x, *mask: _predicted(model, unit(x), *mask), *traced_on)
            )
            axes = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("size")} if loaded.input_size > 1 else {})
            exported = torch.export.export(program, traced_on, dynamic_shapes=tuple(axes for _ in traced_on))
            torch.export.save(exported, buffer, extra_files={SCHEMA_FILE: json.dumps(loaded.schema.to_dict())})
            buffer.seek(0)
            error = _difference(model, torch.export.load(buffer).module(), examples)
    except Exception as fault:  # of dynamo, tracer, exporter or a user's part
        name = type(model.decoder).__name__
        raise InputError(f"torch {torch.__version__} cannot export this model, with {name}: {reason(fault)}") from fault
    if not error <= LARGEST_ERROR:
        raise InputError(f"the exported program differs from the model by {error:.2g}; use the checkpoint instead")
    return buffer.getvalue()


def _scenes(size: int) -> Tensor:
    """Built-in scenes, since on noise a trained descent amplifies its own rounding."""
    records = render_records(range(COMPARED), seed=0, image_size=size, objects=(3, 6))
    return torch.from_numpy(np.stack([record.image for record in records])).permute(0, 3, 1, 2)


def _sets(loaded: Checkpoint, model: SetPredictor) -> tuple[Tensor, Tensor]:
    """Random input sets of all sizes, in the units of the model, and their mask."""
    rng, encoder, most = np.random.default_rng(0), model.encoder, 1
    if loaded.input_size > 1:  # the tracer identifies axes of equal length
        one = torch.zeros(1, 1, encoder.in_dim)
        taken = {*one.shape, *model.encode(one).shape, *model(one).shape}
        most = next(number for number in itertools.count(COMPARED + 1) if number not in taken)
    drawn = torch.from_numpy(rng.standard_normal((COMPARED, most, encoder.in_dim), dtype=np.float32))
    if isinstance(encoder, Normalised):
        drawn = encoder.offset + encoder.scale * drawn
    mask = torch.arange(most) < torch.from_numpy(rng.integers(1, most, COMPARED, endpoint=True)).unsqueeze(1)
    return fill_absent(drawn, mask), mask


def _predicted(model: SetPredictor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(inputs) if mask is None else model(inputs, mask=mask)


def _difference(model: SetPredictor, program: Callable[..., Tensor], examples: tuple[Tensor, ...]) -> float:
    """The `ALIKE` quantile over inputs of the largest difference of an element; NaN if any difference is.

    For two batch sizes other than the traced one: all inputs together, images as bytes, and some one by one as floats.
    """
    joint = program(*examples) - _predicted(model, *examples)
    ones = [tuple(part[number : number + 1] for part in examples) for number in range(SINGLE)]
    single = torch.cat([program(unit_images(one[0]), *one[1:]) - _predicted(model, *one) for one in ones])
    errors = [each.abs().flatten(1).amax(1).quantile(ALIKE, interpolation="lower") for each in (joint, single)]
    return float(torch.stack(errors).max())
