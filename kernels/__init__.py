"""Fused operations as functions on tensors. Knows torch and triton, nothing of models."""
