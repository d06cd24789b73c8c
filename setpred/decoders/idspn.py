"""The iDSPN decoder: a set found by descent on an objective."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.starts import RandomStart
from setpred.errors import InputError
from setpred.inner import GradientDescent, Problem
from setpred.inner.compiled import CompiledEnergy
from setpred.inner.differentiation import Differentiation, Implicit
from setpred.inner.objectives import Energy
from setpred.schema import CLEVR


class IDSPN(nn.Module):
    """Y*(z) = argmin_Y L(Y; z, θ) by gradient descent from Y₀.

    `Implicit` differentiation with the identity solver is iDSPN (Zhang et al., ICLR 2022); `Unrolled` is DSPN
    (NeurIPS 2019). Elements are raw numbers, without sigmoid or softmax.

    Args:
        objective: L(elements, `Problem`) -> `[batch]`.
        descent: how to iterate.
        differentiation: how gradients pass; `Implicit()` unless given.
        set_size, set_dim: of the predicted sets.
        start: Y₀ from the latent; `RandomStart` unless given. The descent's projection, if any, is applied to it
            first, as in the released iDSPN.
        compile: takes the steps that carry no gradients in compiled code: the same result in less time, after some
            seconds of compiling; see `setpred.inner.compiled`. Not with `Implicit(best=True)`, which looks at every
            step's gradient.

    Raises:
        InputError: `compile` with `Implicit(best=True)`; parts of the objective that read tokens of different lengths.
    """

    masks_elements = True  # `mask` speaks of the predicted elements, not of tokens

    def __init__(
        self,
        objective: nn.Module,
        descent: GradientDescent,
        differentiation: Differentiation | None = None,
        *,
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
        start: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.descent = descent
        self.differentiation = Implicit() if differentiation is None else differentiation
        if compile and getattr(self.differentiation, "best", False):
            raise InputError(
                "a compiled descent keeps the last iterate, and best asks for the best one; set compile or best to "
                "false"
            )
        self.set_size, self.set_dim = set_size, set_dim
        self.start = RandomStart(set_size, set_dim) if start is None else start
        self.compiled = compile
        # tokens where a part of the objective reads them, else a vector
        read = {part.token_dim for part in objective.modules() if getattr(part, "token_dim", None) is not None}
        if len(read) > 1:
            raise InputError(
                f"the parts of the objective read tokens of {sorted(read)} numbers; give them one token_dim"
            )
        self.token_dim = next(iter(read), None)
        # anywhere inside: `Sum` may hold it
        self.conditional = any(getattr(part, "conditional", False) for part in objective.modules())

    def refine(
        self,
        latent: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yields every iterate Y₀, …, Y_T `[batch, set_size, set_dim]`; see `forward`."""
        latent = latent.float() if latent.dtype in (torch.float16, torch.bfloat16) else latent
        initial = self.descent.project(self.start(latent).to(latent.dtype))
        problem = Problem(latent, initial, mask, condition)

        steps = self.descent.iterations if iterations is None else iterations
        energy = (CompiledEnergy if self.compiled else Energy)(self.objective, problem)
        yield from self.differentiation.iterates(energy, initial, self.descent, steps)

    def forward(
        self,
        latent: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The predicted sets.

        Args:
            latent: z `[batch, latent_dim]`, or tokens `[batch, tokens, token_dim]` for objectives that read them.
            iterations: number of descent steps; the descent's own unless given.
            mask: which elements exist, `[batch, set_size]` bool.
            condition: an input set `[batch, set_size, any]` for a `Conditioned` objective.

        Returns:
            `[batch, set_size, set_dim]`.
        """
        refinement = self.refine(latent, iterations=iterations, mask=mask, condition=condition)
        for elements in refinement:  # noqa: B007
            pass
        return elements
