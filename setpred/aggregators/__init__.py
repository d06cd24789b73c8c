"""Set to vector, one family a file; all usable alone and inside the decoder's objective."""

from setpred.aggregators.attention import AttentionPool
from setpred.aggregators.attsets import AttSets
from setpred.aggregators.base import Aggregator
from setpred.aggregators.basic import MaxPool, MeanPool, SumPool
from setpred.aggregators.equilibrium import EquilibriumAggregation
from setpred.aggregators.frames import FrameAverage
from setpred.aggregators.fspool import FSPool, sort_features
from setpred.aggregators.monoid import LearnableMonoid
from setpred.aggregators.orbits import OrbitPool
from setpred.aggregators.ordering import CanonicalOrder
from setpred.aggregators.potentials import ResidualPotential
from setpred.aggregators.set_encoder import PairwiseSetEncoder, SetEncoder
from setpred.aggregators.superset import SupersetPool

__all__ = [
    "Aggregator",
    "AttSets",
    "AttentionPool",
    "CanonicalOrder",
    "EquilibriumAggregation",
    "FSPool",
    "FrameAverage",
    "LearnableMonoid",
    "MaxPool",
    "MeanPool",
    "OrbitPool",
    "PairwiseSetEncoder",
    "ResidualPotential",
    "SetEncoder",
    "SumPool",
    "SupersetPool",
    "sort_features",
]
