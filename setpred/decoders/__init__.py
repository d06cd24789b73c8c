"""Latent vector to set."""

from setpred.decoders.idspn import IDSPN, LearnedStart, RandomStart

__all__ = ["IDSPN", "LearnedStart", "RandomStart"]
