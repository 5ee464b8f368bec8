"""Causal attention over packed documents of any lengths, with grouped key-value heads."""

from kernels.attention.decode import decode_attention, decode_attention_reference
from kernels.attention.dispatch import attention
from kernels.attention.reference import attention_reference

__all__ = ["attention", "attention_reference", "decode_attention", "decode_attention_reference"]
