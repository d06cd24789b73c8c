"""Small worlds: tasks on sets that train in minutes and need no download."""

from setpred.data.worlds.base import Examples, World
from setpred.data.worlds.multisets import Multisets

__all__ = [
    "Examples",
    "Multisets",
    "World",
]
