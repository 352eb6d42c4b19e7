"""Attention for jax, usable alone: one public call, several backends. See README.md."""

from .attention import attention, backends, explain
from .masks import And, Causal, Chunked, Full, Mask, Prefix, Window
from .merge import merge
from .ring import ring_attention, unzigzag, zigzag
from .spec import Alibi, Unsupported

__all__ = [
    "Alibi",
    "And",
    "Causal",
    "Chunked",
    "Full",
    "Mask",
    "Prefix",
    "Unsupported",
    "Window",
    "attention",
    "backends",
    "explain",
    "merge",
    "ring_attention",
    "unzigzag",
    "zigzag",
]
