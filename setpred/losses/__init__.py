"""Set losses, per example: sets `[batch, n, dim]` and `[batch, m, dim]` to `[batch]`."""

from setpred.losses.base import SetLoss
from setpred.losses.chamfer import ChamferLoss
from setpred.losses.cross_entropy import CrossEntropy
from setpred.losses.detr import DETRCriterion, generalised_iou
from setpred.losses.hungarian import HungarianLoss
from setpred.losses.numbering import NumberingLoss
from setpred.losses.ot_seq2set import MatchingWithTransport
from setpred.losses.reconstruction import Reconstruction
from setpred.losses.sinkhorn import SinkhornDivergence
from setpred.losses.sliced import DistributionalSlicedWasserstein, MaxSlicedWasserstein, SlicedWasserstein
from setpred.losses.soft_equivariance import SoftEquivariance, equivariance_error
from setpred.losses.squared_error import SquaredError
from setpred.nn import record_parts

__all__ = [
    "ChamferLoss",
    "CrossEntropy",
    "DETRCriterion",
    "DistributionalSlicedWasserstein",
    "HungarianLoss",
    "MatchingWithTransport",
    "MaxSlicedWasserstein",
    "NumberingLoss",
    "Reconstruction",
    "SetLoss",
    "SinkhornDivergence",
    "SlicedWasserstein",
    "SoftEquivariance",
    "SquaredError",
    "equivariance_error",
    "generalised_iou",
]

record_parts(globals())
