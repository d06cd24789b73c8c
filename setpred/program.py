"""A model as a program of torch.export: it runs where torch is, without setpred, for batches of any size."""

from __future__ import annotations

import copy
import io
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from setpred.checkpoint import Checkpoint
from setpred.decoders import IDSPN
from setpred.errors import InputError, reason
from setpred.inner import Problem
from setpred.inner.descent import State
from setpred.inner.differentiation import inner_gradient
from setpred.model import SetPredictor

SCHEMA_FILE = "schema.json"  # inside the program: what the numbers of an element mean
LARGEST_ERROR = 1e-3  # between program and model; rounding over a whole descent is a hundredth of that


class FixedStart(nn.Module):
    """The start of example 0 for every example: an exported program cannot draw by index."""

    def __init__(self, start: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("initial", start(features, torch.tensor([0])))

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        return self.initial.expand(features.shape[0], -1, -1)


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
            problem = Problem(latent, initial)
            iterate = iterate.detach().requires_grad_()
            gradient = inner_gradient(lambda y: decoder.objective(y, problem), iterate, create_graph=False)
            # a velocity of zeros makes the first step one like the others, and a loop must not return what it got
            after = decoder.descent.step(State(iterate.detach(), velocity), gradient)
            return after.iterate, torch.zeros_like(velocity) if after.velocity is None else after.velocity

        latent, initial = self.given(images)
        self.step = traced(step, latent, initial, initial, torch.zeros_like(initial))

    def given(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latent vectors, and where the descent starts."""
        decoder, latent = self.model.decoder, self.model.encode(images)
        return latent, decoder.descent.project(decoder.start(latent, None)).contiguous()

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

    The program takes uint8 images `[batch, 3, size, size]` and gives elements `[batch, set_size, set_dim]`, as the
    model does with `index` zero for every image. Load it with `torch.export.load(FILE).module()`; its extra file
    `SCHEMA_FILE` says what the numbers of an element mean.

    Raises:
        InputError: torch cannot trace or export the model, or the program differs from it.
    """
    size, buffer = loaded.image_size, io.BytesIO()
    model = copy.deepcopy(loaded.model).cpu().eval().requires_grad_(False)
    images = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        features = model.encode(images)
        if hasattr(model.decoder, "start"):
            model.decoder.start = FixedStart(model.decoder.start, features)
        # the tracer takes equal lengths for one and the same: a batch like no other length
        others = {*images.shape, *features.shape, *loaded.model(images).shape}
        batch = next(number for number in itertools.count(3) if number not in others)
        images = images.expand(batch, -1, -1, -1).clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own affairs
            # exactly this class: a subclass may do something else
            last = type(model.decoder) is IDSPN and not getattr(model.decoder.differentiation, "best", False)
            program = DescentProgram(model, images) if last else traced(model, images)
            exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(exported, buffer, extra_files={SCHEMA_FILE: json.dumps(loaded.schema.to_dict())})
            buffer.seek(0)
            apart = _difference(loaded.model, torch.export.load(buffer).module(), size)
    except Exception as error:  # of many kinds: dynamo's, the tracer's, the exporter's, those of a start of one's own
        name = type(model.decoder).__name__
        raise InputError(f"torch {torch.__version__} cannot export this model, with {name}: {reason(error)}") from error
    if not apart <= LARGEST_ERROR:
        raise InputError(f"the exported program differs from the model by {apart:.2g}; use the checkpoint instead")
    return buffer.getvalue()


def _difference(model: SetPredictor, program: Callable[[Tensor], Tensor], size: int) -> float:
    """The largest between elements of model and program, on batches of other sizes than the traced one."""
    generator, apart = torch.Generator().manual_seed(1), []
    for count in (1, 33):
        images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        expected = model(images, index=torch.zeros(count, dtype=torch.long))
        apart.append((program(images) - expected).abs().max())
    return float(torch.stack(apart).max())  # NaN if one is
