"""Toy tasks on sets: most need no download and train in minutes; two read files that the user has."""

from setpred.data.toy.base import Examples, World
from setpred.data.toy.depths import Depths
from setpred.data.toy.digits import DigitCounting, DigitPoints, RotatedDigits
from setpred.data.toy.median import Median
from setpred.data.toy.motion import MovingPoints
from setpred.data.toy.multisets import Multisets
from setpred.data.toy.numbering import Numbering
from setpred.data.toy.omniglot import OmniglotCounting
from setpred.data.toy.qm9 import QM9
from setpred.data.toy.solids import Solids
from setpred.data.toy.three_cells import ThreeCells
from setpred.data.toy.uncertain_points import UncertainPoints

__all__ = [
    "QM9",
    "Depths",
    "DigitCounting",
    "DigitPoints",
    "Examples",
    "Median",
    "MovingPoints",
    "Multisets",
    "Numbering",
    "OmniglotCounting",
    "RotatedDigits",
    "Solids",
    "ThreeCells",
    "UncertainPoints",
    "World",
]
