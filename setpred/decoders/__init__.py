"""Decoders from features, a vector or tokens, to a set."""

from setpred.decoders.base import SetDecoder
from setpred.decoders.baselines import BiLSTMDecoder, MLPDecoder, TransformerDecoder
from setpred.decoders.detr import DETR
from setpred.decoders.eqmotion import EqMotion
from setpred.decoders.flow_matching import FlowMatching
from setpred.decoders.glimpses import Glimpses
from setpred.decoders.idspn import IDSPN
from setpred.decoders.readout import Readout, SlotReader
from setpred.decoders.seq2set import Seq2Set
from setpred.decoders.set_to_set import DeepSets, ElementBiLSTM, ElementTransformer, RandomPositions, SequencePositions
from setpred.decoders.sinkhorn_mesh import MESH, SinkhornAttention
from setpred.decoders.slot_attention import SlotAttention, SlotSoftmax
from setpred.decoders.slot_mixture import SlotMixture
from setpred.decoders.spatial_broadcast import SpatialBroadcast
from setpred.decoders.starts import GaussianStart, GreedyVotes, LearnedStart, RandomStart
from setpred.nn import record_parts

__all__ = [
    "DETR",
    "IDSPN",
    "MESH",
    "BiLSTMDecoder",
    "DeepSets",
    "ElementBiLSTM",
    "ElementTransformer",
    "EqMotion",
    "FlowMatching",
    "GaussianStart",
    "Glimpses",
    "GreedyVotes",
    "LearnedStart",
    "MLPDecoder",
    "RandomPositions",
    "RandomStart",
    "Readout",
    "Seq2Set",
    "SequencePositions",
    "SetDecoder",
    "SinkhornAttention",
    "SlotAttention",
    "SlotMixture",
    "SlotReader",
    "SlotSoftmax",
    "SpatialBroadcast",
    "TransformerDecoder",
]

record_parts(globals())
