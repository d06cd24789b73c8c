"""Aggregators, from a set to a vector; usable alone and inside a decoder's objective."""

from setpred.aggregators.attsets import AttSets
from setpred.aggregators.base import Aggregator
from setpred.aggregators.canonical_order import CanonicalOrder
from setpred.aggregators.equilibrium import EquilibriumAggregation, ResidualPotential
from setpred.aggregators.frame_averaging import FrameAverage
from setpred.aggregators.fspool import FSPool
from setpred.aggregators.gigp import GIGP
from setpred.aggregators.inset import INSET
from setpred.aggregators.monoid import LearnableMonoid
from setpred.aggregators.pma import PMA
from setpred.aggregators.set_encoder import PairwiseSetEncoder, SetEncoder
from setpred.aggregators.sum_mean_max import MaxPool, MeanPool, SumPool
from setpred.nn import record_parts

__all__ = [
    "GIGP",
    "INSET",
    "PMA",
    "Aggregator",
    "AttSets",
    "CanonicalOrder",
    "EquilibriumAggregation",
    "FSPool",
    "FrameAverage",
    "LearnableMonoid",
    "MaxPool",
    "MeanPool",
    "PairwiseSetEncoder",
    "ResidualPotential",
    "SetEncoder",
    "SumPool",
]

record_parts(globals())
