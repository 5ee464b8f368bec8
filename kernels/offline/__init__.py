"""Kernels compiled without a GPU: what would run on an A100 or an H100, and what the compiler made of it."""
