"""Features, a vector or tokens, to a set."""

from setpred.decoders.base import SetDecoder
from setpred.decoders.bilstm import BiLSTMDecoder
from setpred.decoders.deep_sets import DeepSets
from setpred.decoders.detr import DETR, SinePosition
from setpred.decoders.element_bilstm import ElementBiLSTM
from setpred.decoders.element_transformer import ElementTransformer
from setpred.decoders.greedy_votes import GreedyVotes
from setpred.decoders.idspn import IDSPN
from setpred.decoders.mesh import MESH
from setpred.decoders.mlp import MLPDecoder
from setpred.decoders.positions import RandomPositions, SequencePositions
from setpred.decoders.seq2set import Seq2Set
from setpred.decoders.sinkhorn_attention import SinkhornAttention
from setpred.decoders.slot_attention import SlotAttention, SlotSoftmax
from setpred.decoders.slot_mixture import SlotMixture
from setpred.decoders.starts import GaussianStart, LearnedStart, RandomStart
from setpred.decoders.transformer import TransformerDecoder

__all__ = [
    "DETR",
    "IDSPN",
    "MESH",
    "BiLSTMDecoder",
    "DeepSets",
    "ElementBiLSTM",
    "ElementTransformer",
    "GaussianStart",
    "GreedyVotes",
    "LearnedStart",
    "MLPDecoder",
    "RandomPositions",
    "RandomStart",
    "Seq2Set",
    "SequencePositions",
    "SetDecoder",
    "SinePosition",
    "SinkhornAttention",
    "SlotAttention",
    "SlotMixture",
    "SlotSoftmax",
    "TransformerDecoder",
]
