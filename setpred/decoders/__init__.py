"""Features, a vector or tokens, to a set."""

from setpred.decoders.base import SetDecoder
from setpred.decoders.idspn import IDSPN
from setpred.decoders.slot_attention import SlotAttention, SlotSoftmax
from setpred.decoders.starts import GaussianStart, LearnedStart, RandomStart

__all__ = [
    "IDSPN",
    "GaussianStart",
    "LearnedStart",
    "RandomStart",
    "SetDecoder",
    "SlotAttention",
    "SlotSoftmax",
]
