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
from setpred.errors import InputError, reason
from setpred.inner import Problem
from setpred.inner.descent import State
from setpred.inner.differentiation import plain_step
from setpred.inner.objectives import Energy
from setpred.model import SetPredictor

SCHEMA_FILE = "schema.json"  # extra file of the program: the meaning of an element's numbers
LARGEST_ERROR = 1e-3  # between program and model; rounding over a complete descent gives a hundredth of that
COMPARED, SINGLE = 24, 8  # images that both predict, and how many of them also one by one
ALIKE = 0.75  # least share of images within that error


def unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float in [0, 1]; return float images unchanged.

    As `setpred.model.unit_images`, but without an `if`, which the tracer would decide.
    """
    of_bytes = images.new_full((), 0.5) == 0  # a byte rounds 0.5 down
    return torch.where(of_bytes, images / 255, images * 1.0)


class DescentProgram(nn.Module):
    """An `IDSPN` model as `while_loop` over one step of the descent, since forty steps are ten thousand operations.

    torch.export does not trace `autograd.grad`, but `make_fx` does.
    """

    def __init__(self, model: SetPredictor, images: Tensor) -> None:
        super().__init__()
        self.model = model
        decoder: IDSPN = model.decoder

        def step(latent: Tensor, initial: Tensor, iterate: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
            energy = Energy(decoder.objective, Problem(latent, initial))
            # a velocity of zeros makes the first step equal to the others, and a loop must not return its inputs
            after = plain_step(energy, State(iterate, velocity), decoder.descent)
            return after.iterate, torch.zeros_like(velocity) if after.velocity is None else after.velocity

        latent, initial = self.start(images)
        # a copy: the tracer merges equal tensors into one input, and objectives may read both
        self.step = traced(step, latent, initial, initial.clone(), torch.zeros_like(initial))

    def start(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latent vectors, and the first iterate of the descent."""
        decoder, latent = self.model.decoder, self.model.encode(unit(images))
        return latent, decoder.descent.project(decoder.start(latent)).contiguous()

    def forward(self, images: Tensor) -> Tensor:
        latent, initial = self.start(images)
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
    `[batch, set_size, set_dim]`, as the model in evaluation. Load it with `torch.export.load(FILE).module()`; its
    extra file `SCHEMA_FILE` describes the elements.

    The check compares the predictions of `COMPARED` built-in scenes: for a share of `ALIKE` images all elements must
    agree to `LARGEST_ERROR`. A descent can turn rounding into another set for a few images; another function differs
    for all. Raises `InputError` if the program differs, or torch cannot trace or export the model.
    """
    size, buffer = loaded.image_size, io.BytesIO()
    model = copy.deepcopy(loaded.model).cpu().eval().requires_grad_(False)
    try:
        # scenes, since on noise a trained descent amplifies its own rounding
        records = render_records(range(COMPARED), seed=0, image_size=size, objects=(3, 6))
        scenes = torch.from_numpy(np.stack([record.image for record in records])).permute(0, 3, 1, 2)
        # the tracer identifies axes of equal length: choose a batch size that no other axis has
        others = {*scenes.shape, *model.encode(scenes).shape, *model(scenes).shape}
        batch = next(number for number in itertools.count(3) if number not in others)
        images = scenes[:1].expand(batch, -1, -1, -1).clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            # exactly this class, since a subclass may compute something else
            last = type(model.decoder) is IDSPN and not getattr(model.decoder.differentiation, "best", False)
            program = DescentProgram(model, images) if last else traced(lambda x: model(unit(x)), images)
            exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(exported, buffer, extra_files={SCHEMA_FILE: json.dumps(loaded.schema.to_dict())})
            buffer.seek(0)
            error = _difference(model, torch.export.load(buffer).module(), scenes)
    except Exception as fault:  # of dynamo, tracer, exporter or a user's part
        name = type(model.decoder).__name__
        raise InputError(f"torch {torch.__version__} cannot export this model, with {name}: {reason(fault)}") from fault
    if not error <= LARGEST_ERROR:
        raise InputError(f"the exported program differs from the model by {error:.2g}; use the checkpoint instead")
    return buffer.getvalue()


def _difference(model: SetPredictor, program: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The `ALIKE` quantile over images of the largest difference of an element; NaN if any difference is.

    For two batch sizes other than the traced one: all images together as bytes, and some one by one as floats.
    """
    joint = program(images) - model(images)
    single = torch.cat([program(image / 255) - model(image) for image in images[:SINGLE].split(1)])
    errors = [each.abs().flatten(1).amax(1).quantile(ALIKE, interpolation="lower") for each in (joint, single)]
    return float(torch.stack(errors).max())
