"""min_Y L(Y): the objective, the descent and its differentiation are three independent choices."""

from setpred.inner.descent import GradientDescent, State, clip_norm
from setpred.inner.differentiation import Differentiation, Implicit, Unrolled, inner_gradient, minimise
from setpred.inner.linear_solvers import ConjugateGradient, Exact, Identity, LinearSolver, Neumann
from setpred.inner.objectives import Conditioned, EquilibriumMatching, LatentMatching, OfTokens, Problem, Proximity, Sum
from setpred.inner.projections import Projection, Simplex, simplex
from setpred.inner.voting import VotingEnergy
from setpred.nn import record_parts

__all__ = [
    "Conditioned",
    "ConjugateGradient",
    "Differentiation",
    "EquilibriumMatching",
    "Exact",
    "GradientDescent",
    "Identity",
    "Implicit",
    "LatentMatching",
    "LinearSolver",
    "Neumann",
    "OfTokens",
    "Problem",
    "Projection",
    "Proximity",
    "Simplex",
    "State",
    "Sum",
    "Unrolled",
    "VotingEnergy",
    "clip_norm",
    "inner_gradient",
    "minimise",
    "simplex",
]

record_parts(globals())
