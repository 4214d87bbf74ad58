"""Trained modules of neighbouring systems, whose search is half-space reporting; they need torch."""

from attention.modules.compositional import Composed, CompositionalAttention, Searches
from attention.modules.decoupled import DecoupledAttention, DecoupledSession, decode_by_index
from attention.modules.projection import Gates, causal_sparsek, sparsek, sparsek_by_index
from attention.modules.sparsek_attention import Rows, SparseKAttention, SparseKCache

__all__ = [
    "Composed",
    "CompositionalAttention",
    "DecoupledAttention",
    "DecoupledSession",
    "Gates",
    "Rows",
    "Searches",
    "SparseKAttention",
    "SparseKCache",
    "causal_sparsek",
    "decode_by_index",
    "sparsek",
    "sparsek_by_index",
]
