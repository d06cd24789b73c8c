"""A model as a program of torch.export: it runs where torch is, without setpred, for batches of any size."""

from __future__ import annotations

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

SCHEMA_FILE = "schema.json"  # inside the program: what the numbers of an element mean
LARGEST_ERROR = 1e-3  # between program and model; rounding over a whole descent is a hundredth of that
COMPARED, ALONE = 24, 8  # images that both predict, and how many of them also one by one
ALIKE = 0.75  # least share of them within that error


def unit(images: Tensor) -> Tensor:
    """uint8 images to float in [0, 1]; float images pass.

    As `setpred.model.unit_images`, but decided when the program runs: an `if` would be decided when it is traced.
    """
    of_bytes = images.new_full((), 0.5) == 0  # a byte holds no half
    return torch.where(of_bytes, images / 255, images * 1.0)


class DescentProgram(nn.Module):
    """An `IDSPN` model as `while_loop` over one step of the descent, which has been traced.

    torch.export does not trace `autograd.grad` by itself, `make_fx` does; and a loop keeps the program small, where
    forty steps one after the other are ten thousand operations.
    """

    def __init__(self, model: SetPredictor, images: Tensor) -> None:
        super().__init__()
        self.model = model
        decoder: IDSPN = model.decoder

        def step(latent: Tensor, initial: Tensor, iterate: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
            energy = Energy(decoder.objective, Problem(latent, initial))
            # a velocity of zeros makes the first step one like the others, and a loop must not return what it got
            after = plain_step(energy, State(iterate, velocity), decoder.descent)
            return after.iterate, torch.zeros_like(velocity) if after.velocity is None else after.velocity

        latent, initial = self.given(images)
        # a copy: the tracer takes one tensor given twice for one input, and objectives may read both
        self.step = traced(step, latent, initial, initial.clone(), torch.zeros_like(initial))

    def given(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latent vectors, and where the descent starts."""
        decoder, latent = self.model.decoder, self.model.encode(unit(images))
        return latent, decoder.descent.project(decoder.start(latent)).contiguous()

    def forward(self, images: Tensor) -> Tensor:
        latent, initial = self.given(images)
        iterations = self.model.decoder.descent.iterations

        def unfinished(done: Tensor, iterate: Tensor, velocity: Tensor) -> Tensor:
            return done < iterations

        def further(done: Tensor, iterate: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (done + 1, *self.step(latent, initial, iterate, velocity))

        return while_loop(unfinished, further, (torch.tensor(0), initial.clone(), torch.zeros_like(initial)))[1]


class _FlatLinear(TorchFunctionMode):
    """Linear layers as matrix products: inside torch.func.grad torch's own would fix the batch that is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear or args[0].ndim <= 2:
            return func(*args, **(kwargs or {}))
        rows, weight, *rest = args
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        product = rows.flatten(0, -2) @ weight.t()
        return (product if bias is None else product + bias).view(*rows.shape[:-1], weight.shape[0])


@torch.no_grad()
def traced(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The operations of a function of tensors, inner gradients written out; their first axis may have any length."""
    with _FlatLinear():
        return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*examples)


@torch.no_grad()
def export_program(loaded: Checkpoint) -> bytes:
    """The model of a checkpoint as the content of a .pt2 file, checked against the model.

    The program takes images `[batch, 3, size, size]`, uint8 or float32 in [0, 1], and gives elements
    `[batch, set_size, set_dim]`, as the model does in evaluation. Load it with `torch.export.load(FILE).module()`; its
    extra file `SCHEMA_FILE` says what the numbers of an element mean.

    The check: both predict `COMPARED` built-in scenes, and of the largest differences of each image's elements the
    share `ALIKE` is at most `LARGEST_ERROR`. Not all, since a descent may turn a rounding into another set for a few
    images; another function differs for all of them.

    Raises:
        InputError: torch cannot trace or export the model, or the program differs from it.
    """
    size, buffer = loaded.image_size, io.BytesIO()
    model = copy.deepcopy(loaded.model).cpu().eval().requires_grad_(False)
    try:
        scenes = _scenes(size)
        # the tracer takes equal lengths for one and the same: a batch like no other length
        others = {*scenes.shape, *model.encode(scenes).shape, *model(scenes).shape}
        batch = next(number for number in itertools.count(3) if number not in others)
        images = scenes[:1].expand(batch, -1, -1, -1).clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own affairs
            # exactly this class: a subclass may do something else
            last = type(model.decoder) is IDSPN and not getattr(model.decoder.differentiation, "best", False)
            program = DescentProgram(model, images) if last else traced(lambda x: model(unit(x)), images)
            exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(exported, buffer, extra_files={SCHEMA_FILE: json.dumps(loaded.schema.to_dict())})
            buffer.seek(0)
            apart = _difference(model, torch.export.load(buffer).module(), scenes)
    except Exception as error:  # of many kinds: dynamo's, the tracer's, the exporter's, those of a start of one's own
        name = type(model.decoder).__name__
        raise InputError(f"torch {torch.__version__} cannot export this model, with {name}: {reason(error)}") from error
    if not apart <= LARGEST_ERROR:
        raise InputError(f"the exported program differs from the model by {apart:.2g}; use the checkpoint instead")
    return buffer.getvalue()


def _scenes(size: int) -> Tensor:
    """Built-in scenes, uint8 `[COMPARED, 3, size, size]`: on noise a trained descent follows its own rounding."""
    records = render_records(range(COMPARED), seed=0, image_size=size, objects=(3, 6))
    return torch.from_numpy(np.stack([record.image for record in records])).permute(0, 3, 1, 2)


def _difference(model: SetPredictor, program: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Of an image's elements the largest, of all but 1 - `ALIKE` of the images; NaN if one is.

    In batches of other sizes than the traced one: all images together, and some alone, given as floats.
    """
    together = program(images) - model(images)
    alone = [program(image / 255) - model(image) for image in images[:ALONE].split(1)]
    apart = [
        each.abs().flatten(1).amax(1).quantile(ALIKE, interpolation="lower") for each in (together, torch.cat(alone))
    ]
    return float(torch.stack(apart).max())
