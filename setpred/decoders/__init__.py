"""Features, a vector or tokens, to a set."""

from setpred.decoders.base import SetDecoder
from setpred.decoders.idspn import IDSPN
from setpred.decoders.mesh import MESH
from setpred.decoders.sinkhorn_attention import SinkhornAttention
from setpred.decoders.slot_attention import SlotAttention, SlotSoftmax
from setpred.decoders.slot_mixture import SlotMixture
from setpred.decoders.starts import GaussianStart, LearnedStart, RandomStart

__all__ = [
    "IDSPN",
    "MESH",
    "GaussianStart",
    "LearnedStart",
    "RandomStart",
    "SetDecoder",
    "SinkhornAttention",
    "SlotAttention",
    "SlotMixture",
    "SlotSoftmax",
]
