"""Attention and related operations for jax: one function each, several backends.

Usable without genai_jax. See README.md.
"""

from .attention import attention, backends, explain
from .caches import ContiguousCache, Int8, PagedCache, RingCache, append, quantize
from .decoding import decode, explain_decode
from .grouped_matmul import grouped_matmul
from .linear_cross_entropy import CrossEntropy, linear_cross_entropy
from .masks import And, Causal, Chunked, Full, Mask, Prefix, Window
from .merge import merge
from .ring import ring_attention, unzigzag, zigzag
from .rms_norm import rms_norm
from .selective_scan import selective_scan
from .spec import Alibi, Unsupported

__all__ = [
    "Alibi",
    "And",
    "Causal",
    "Chunked",
    "ContiguousCache",
    "CrossEntropy",
    "Full",
    "Int8",
    "Mask",
    "PagedCache",
    "Prefix",
    "RingCache",
    "Unsupported",
    "Window",
    "append",
    "attention",
    "backends",
    "decode",
    "explain",
    "explain_decode",
    "grouped_matmul",
    "linear_cross_entropy",
    "merge",
    "quantize",
    "ring_attention",
    "rms_norm",
    "selective_scan",
    "unzigzag",
    "zigzag",
]
