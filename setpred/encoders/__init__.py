"""Encoders from image or set to a latent vector or to tokens, and their trunks."""

from setpred.encoders.cnn import ResidualTrunk, SlotTrunk, SmallCNN, SmallTrunk
from setpred.encoders.elements import Elements, ElementTokens, Normalised, Pooled, SetTokens, WindowTokens
from setpred.encoders.resnet import ResNet, ResNetTrunk
from setpred.encoders.tokens import PositionedTokens, Tokens, Votes, position_grid
from setpred.encoders.vsformer import ViewTokens
from setpred.nn import record_parts

__all__ = [
    "ElementTokens",
    "Elements",
    "Normalised",
    "Pooled",
    "PositionedTokens",
    "ResNet",
    "ResNetTrunk",
    "ResidualTrunk",
    "SetTokens",
    "SlotTrunk",
    "SmallCNN",
    "SmallTrunk",
    "Tokens",
    "ViewTokens",
    "Votes",
    "WindowTokens",
    "position_grid",
]

record_parts(globals())
