"""Gradient descent with Nesterov momentum, clipping and projection."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from setpred.inner.projections import Projection
from setpred.nn import softplus_inverse


class State(NamedTuple):
    """The iterate of a descent and its velocity, both `[batch, ...]`; the velocity is None before the first step."""

    iterate: Tensor
    velocity: Tensor | None = None


def clip_norm(gradient: Tensor, largest: float) -> Tensor:
    """Scale each example's gradient `[batch, ...]` to an L2 norm of at most `largest`; its direction stays."""
    # clamped before the root, so that derivatives of every order are finite at a zero gradient
    factor = (gradient / largest).flatten(1).square().sum(1).clamp(min=1.0).rsqrt()
    return gradient * factor.view(-1, *[1] * (gradient.ndim - 1))


class GradientDescent(nn.Module):
    """Nesterov gradient descent, independent for each example of the batch.

    With g = ∇L(Y), clipped per example to norm `clip`:

        V ← μ V + g,    Y ← P(Y - η (g + μ V))

    This is `torch.optim.SGD(nesterov=True)`, whose iterates are the look-ahead points of the textbook form (Sutskever
    et al., ICML 2013). If the objective has a `curvature` h, g is h⁻¹ ∇L(Y); see `inner.differentiation.curvature_at`.

    Args:
        iterations: default number of steps T.
        learning_rate: η.
        momentum: μ in [0, 1); 0 is plain gradient descent.
        clip: largest L2 norm of an example's gradient; None does not clip.
        projection: P, applied after each step; None is the identity.
        learned: makes η (by a softplus) and μ (by a sigmoid) parameters that **start at the values given here**. Only
            `Unrolled` differentiation gives them gradients.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        iterations: int,
        learning_rate: float = 1.0,
        momentum: float = 0.0,
        clip: float | None = None,
        projection: Projection | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        if iterations < 0 or learning_rate <= 0 or not 0 <= momentum < 1 or (clip is not None and clip <= 0):
            raise ValueError(
                "expected iterations >= 0, learning_rate > 0, 0 <= momentum < 1 and clip > 0, got "
                f"{iterations}, {learning_rate}, {momentum}, {clip}"
            )
        self.iterations, self.clip, self.projection, self.learned = iterations, clip, projection, learned
        if learned:
            momentum = max(momentum, 1e-4)  # a sigmoid does not reach 0
            self.raw_learning_rate = nn.Parameter(torch.tensor(softplus_inverse(learning_rate)))
            self.raw_momentum = nn.Parameter(torch.tensor(math.log(momentum / (1 - momentum))))
        else:
            self._learning_rate, self._momentum = learning_rate, momentum

    @property
    def learning_rate(self) -> float | Tensor:
        """η in effect."""
        return nn.functional.softplus(self.raw_learning_rate) if self.learned else self._learning_rate

    @property
    def momentum(self) -> float | Tensor:
        """μ in effect."""
        return self.raw_momentum.sigmoid() if self.learned else self._momentum

    def step(self, state: State, gradient: Tensor) -> State:
        """Take one step from `state` along g, the gradient at its iterate divided by the curvature if there is one."""
        if self.clip is not None:
            gradient = clip_norm(gradient, self.clip)
        momentum = self.momentum
        if not self.learned and momentum == 0:
            velocity, direction = None, gradient
        else:
            velocity = gradient if state.velocity is None else momentum * state.velocity + gradient
            direction = gradient + momentum * velocity
        return State(self.project(state.iterate - self.learning_rate * direction), velocity)

    def project(self, iterate: Tensor) -> Tensor:
        return iterate if self.projection is None else self.projection(iterate)

    def extra_repr(self) -> str:
        rate, momentum = (float(torch.as_tensor(value).detach()) for value in (self.learning_rate, self.momentum))
        numbers = f"iterations={self.iterations}, learning_rate={rate:.4g}, momentum={momentum:.4g}"
        return f"{numbers}, clip={self.clip}, learned={self.learned}"
