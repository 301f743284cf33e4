"""Layers: compaction in the middle of a network, rows without a gradient, attention over chosen blocks of tokens."""

from sparse_training.nn.batch_norm import BatchNorm
from sparse_training.nn.block_choice import choose_blocks
from sparse_training.nn.compaction import Compact, Expand
from sparse_training.nn.drop_zero_rows import DropZeroRows
from sparse_training.nn.drop_zero_sequences import KeptSequences, drop_zero_sequences
from sparse_training.nn.sparse_attention import BlockSparseAttention, attends_densely, block_sparse_attention

__all__ = [
    "BatchNorm",
    "BlockSparseAttention",
    "Compact",
    "DropZeroRows",
    "Expand",
    "KeptSequences",
    "attends_densely",
    "block_sparse_attention",
    "choose_blocks",
    "drop_zero_sequences",
]
