"""Small worlds: tasks on sets that train in minutes and need no download, and two that read files a user has."""

from setpred.data.worlds.base import Examples, World
from setpred.data.worlds.digits import DigitCounting, DigitPoints, RotatedDigits
from setpred.data.worlds.median import Median
from setpred.data.worlds.multisets import Multisets
from setpred.data.worlds.numbering import Numbering
from setpred.data.worlds.omniglot import OmniglotCounting
from setpred.data.worlds.qm9 import QM9

__all__ = [
    "QM9",
    "DigitCounting",
    "DigitPoints",
    "Examples",
    "Median",
    "Multisets",
    "Numbering",
    "OmniglotCounting",
    "RotatedDigits",
    "World",
]
