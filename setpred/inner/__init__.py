"""min_Y L(Y): what to solve, how to iterate and how to differentiate, three independent choices."""

from setpred.inner.descent import GradientDescent, State, clip_norm
from setpred.inner.differentiation import Implicit, Unrolled, inner_gradient, minimise
from setpred.inner.linear_solvers import ConjugateGradient, Exact, Identity, Neumann
from setpred.inner.objectives import Conditioned, EquilibriumMatching, LatentMatching, Problem, Proximity, Sum
from setpred.inner.projections import simplex

__all__ = [
    "Conditioned",
    "ConjugateGradient",
    "EquilibriumMatching",
    "Exact",
    "GradientDescent",
    "Identity",
    "Implicit",
    "LatentMatching",
    "Neumann",
    "Problem",
    "Proximity",
    "State",
    "Sum",
    "Unrolled",
    "clip_norm",
    "inner_gradient",
    "minimise",
    "simplex",
]
