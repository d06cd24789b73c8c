"""Compiled steps of a descent, for the steps that carry no gradients."""

import functools
import warnings
import weakref
from collections.abc import Callable

import torch
import torch._dynamo.config as dynamo  # private: optimize_ddp has no public name
from torch import Tensor, nn

from setpred.errors import reason
from setpred.inner.descent import GradientDescent, State
from setpred.inner.differentiation import plain_step
from setpred.inner.objectives import Energy, Problem

MOST_SIZES = 64  # batch sizes that are compiled
_uncompilable: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # objectives whose compilation failed


class CompiledEnergy(Energy):
    """L(Y) of one problem, whose descent takes its gradient-free steps in compiled code.

    Gradient and step form one graph without autograd (`torch.compile(fullgraph=True)`). Steps that carry gradients
    stay uncompiled: the last one of `Implicit`, the last k of `Unrolled(last=k)`, all of `Unrolled()`. On a GPU the
    graph is recorded and replayed (`mode="reduce-overhead"`); this is untested on a GPU.

    The first step compiles, for some seconds to a minute, once for each batch size. If compilation fails, without a
    C++ compiler or for an objective that cannot be traced, one warning reports it and the steps run uncompiled.
    """

    def __init__(self, objective: nn.Module, problem: Problem) -> None:
        super().__init__(objective, problem)
        # constants: one graph serves with and without gradients, and no later step reads memory that a replay reuses
        given = (problem.latent, problem.initial, problem.mask, problem.condition)
        self.given = Problem(*(None if part is None else part.detach().clone() for part in given))

    def step(self, state: State, descent: GradientDescent) -> State:
        """Take one step of the descent without gradients."""
        if self.objective in _uncompilable or torch.is_inference_mode_enabled():
            return plain_step(self, state, descent)
        try:
            return self._compiled_step(state, descent)
        except Exception as error:
            after = plain_step(self, state, descent)  # raises if the problem itself is at fault
            _uncompilable.add(self.objective)
            warnings.warn(f"the descent runs uncompiled, since compiling it failed: {reason(error)}", stacklevel=2)
            return after

    def _compiled_step(self, state: State, descent: GradientDescent) -> State:
        # a velocity of zeros makes the first step one like the others
        velocity = torch.zeros_like(state.iterate) if state.velocity is None else state.velocity
        replayed = state.iterate.is_cuda
        if replayed:
            torch.compiler.cudagraph_mark_step_begin()
        # by default torch stops compiling at the ninth batch size, and always inside DistributedDataParallel
        with torch.no_grad(), dynamo.patch(recompile_limit=MOST_SIZES, optimize_ddp=False):
            iterate = state.iterate.detach().contiguous()
            after = _compiled(replayed)(self.objective, descent, self.given, iterate, velocity.contiguous())
        # the next replay overwrites the tensors that this one returned
        return State(*(None if part is None else part.clone() for part in after)) if replayed else after


@functools.cache
def _compiled(replayed: bool) -> Callable[..., State]:
    # static shapes: a linear layer inside torch.func.grad fixes them anyway
    return torch.compile(_step, fullgraph=True, dynamic=False, mode="reduce-overhead" if replayed else None)


def _step(objective: nn.Module, descent: GradientDescent, problem: Problem, iterate: Tensor, velocity: Tensor) -> State:
    return plain_step(Energy(objective, problem), State(iterate, velocity), descent)
