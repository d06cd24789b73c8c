"""Small worlds: tasks on sets that train in minutes and need no download."""

from setpred.data.worlds.base import Examples, World
from setpred.data.worlds.digits import DigitCounting, DigitPoints, RotatedDigits
from setpred.data.worlds.median import Median
from setpred.data.worlds.multisets import Multisets
from setpred.data.worlds.numbering import Numbering

__all__ = [
    "DigitCounting",
    "DigitPoints",
    "Examples",
    "Median",
    "Multisets",
    "Numbering",
    "RotatedDigits",
    "World",
]
