"""Encoders from image or set to a latent vector or to tokens, and their trunks."""

from setpred.encoders.cnn import ResidualTrunk, SlotTrunk, SmallCNN, SmallTrunk
from setpred.encoders.resnet import ResNet, ResNetTrunk
from setpred.encoders.tokens import Elements, PositionedTokens, Tokens, Votes, position_grid
from setpred.nn import record_parts

__all__ = [
    "Elements",
    "PositionedTokens",
    "ResNet",
    "ResNetTrunk",
    "ResidualTrunk",
    "SlotTrunk",
    "SmallCNN",
    "SmallTrunk",
    "Tokens",
    "Votes",
    "position_grid",
]

record_parts(globals())
