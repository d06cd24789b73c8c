"""Encoders from image or set to a latent vector or to tokens, their trunks and positions."""

from setpred.encoders.cnn import ResidualTrunk, SlotTrunk, SmallCNN, SmallTrunk
from setpred.encoders.elements import Elements, ElementTokens, Normalised, Pooled, SetTokens, WindowTokens
from setpred.encoders.invariant_coordinates import InvariantCoordinates
from setpred.encoders.positions import LinearPosition, SeqPE, SinePosition, position_grid
from setpred.encoders.resnet import ResNet, ResNetTrunk
from setpred.encoders.supervised import Supervised
from setpred.encoders.surface import SurfaceTokens
from setpred.encoders.tokens import Occluded, PositionedTokens, Tokens, Votes
from setpred.encoders.vsformer import ViewTokens
from setpred.nn import record_parts

__all__ = [
    "ElementTokens",
    "Elements",
    "InvariantCoordinates",
    "LinearPosition",
    "Normalised",
    "Occluded",
    "Pooled",
    "PositionedTokens",
    "ResNet",
    "ResNetTrunk",
    "ResidualTrunk",
    "SeqPE",
    "SetTokens",
    "SinePosition",
    "SlotTrunk",
    "SmallCNN",
    "SmallTrunk",
    "Supervised",
    "SurfaceTokens",
    "Tokens",
    "ViewTokens",
    "Votes",
    "WindowTokens",
    "position_grid",
]

record_parts(globals())
