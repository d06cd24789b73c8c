"""Encoders from image or set to a latent vector or to tokens, and their trunks."""

from setpred.encoders.cnn import ResidualTrunk, SlotTrunk, SmallCNN, SmallTrunk
from setpred.encoders.elements import Elements
from setpred.encoders.resnet import ResNet, ResNetTrunk
from setpred.encoders.tokens import PositionedTokens, Tokens, position_grid
from setpred.encoders.votes import Votes

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
