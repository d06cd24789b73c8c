"""The steps of a descent that carry no gradients, as compiled code."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn

from setpred.errors import reason
from setpred.inner.descent import GradientDescent, State
from setpred.inner.differentiation import functional_step, plain_step, refuse_inference_mode
from setpred.inner.objectives import Energy, Problem

MOST_SIZES = 64  # that are compiled
_uncompilable: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # objectives that are not tried again


class CompiledEnergy(Energy):
    """L(Y) of one problem, of which a descent takes the steps that carry no gradients in compiled code.

    Gradient and step are one graph without autograd (`torch.compile(fullgraph=True)`): beside the matrix products that
    is a few passes over memory. The energy itself stays as it is written, and with it all steps that carry gradients:
    the last one of `Implicit`, the last k of `Unrolled(last=k)`, every one of `Unrolled()`.

    Compiling happens at the first step, takes some seconds to a minute, and serves all objectives of the same parts and
    sizes; each further batch size compiles once more. Where it fails, for want of a C++ compiler or because the
    objective cannot be traced, one warning says so and the objective's steps are taken as they are written.

    On a GPU the graph is recorded and replayed (`mode="reduce-overhead"`), since launches are most of the time there;
    this has not been tried on one yet.

    Args:
        objective: L(elements, `Problem`) -> `[batch]`.
        problem: what is given.
    """

    def __init__(self, objective: nn.Module, problem: Problem) -> None:
        super().__init__(objective, problem)
        # as constants: with and without gradients is one graph, and memory that a GPU's graphs reuse is not read later
        given = (problem.latent, problem.initial, problem.mask, problem.condition)
        self.given = Problem(*(None if part is None else part.detach().clone() for part in given))

    def step(self, state: State, descent: GradientDescent) -> State:
        """One step of the descent that carries no gradients."""
        if self.objective in _uncompilable:
            return plain_step(self, state, descent)
        try:
            return self._compiled_step(state, descent)
        except Exception as error:
            after = plain_step(self, state, descent)  # raises what is wrong with the problem itself
            _uncompilable.add(self.objective)
            warnings.warn(f"the descent goes on uncompiled, since compiling it failed: {reason(error)}", stacklevel=2)
            return after

    def _compiled_step(self, state: State, descent: GradientDescent) -> State:
        refuse_inference_mode()
        # a velocity of zeros makes the first step one like the others
        velocity = torch.zeros_like(state.iterate) if state.velocity is None else state.velocity
        replayed = state.iterate.is_cuda
        if replayed:
            torch.compiler.cudagraph_mark_step_begin()
        # in full precision, as every descent
        with (
            torch.no_grad(),
            torch.autocast(state.iterate.device.type, enabled=False),
            # by itself, torch would give up at the ninth batch size, and always inside DistributedDataParallel
            dynamo.config.patch(recompile_limit=MOST_SIZES, optimize_ddp=False),
        ):
            iterate = state.iterate.detach().contiguous()
            after = _compiled(replayed)(self.objective, descent, self.given, iterate, velocity.contiguous())
        # the next replay writes over what this one returned
        return State(*(None if part is None else part.clone() for part in after)) if replayed else after


@functools.cache
def _compiled(replayed: bool) -> Callable[..., State]:
    # of fixed sizes: a linear layer of sets inside torch.func.grad fixes them anyway
    return torch.compile(_step, fullgraph=True, dynamic=False, mode="reduce-overhead" if replayed else None)


def _step(objective: nn.Module, descent: GradientDescent, problem: Problem, iterate: Tensor, velocity: Tensor) -> State:
    return functional_step(Energy(objective, problem), State(iterate, velocity), descent)
